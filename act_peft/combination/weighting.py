"""Several adapters with a weight each: what users may write, as a list of names, places and factors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_peft.checks import finite_number
from act_peft.errors import ActTypeError, ActValueError


@dataclass(frozen=True)
class Weighted:
    """An adapter on disk: its name, its folder or Hub id, and its factor."""

    name: str
    location: str
    weight: float


def weighted_adapters(adapters: Any, weights: Any) -> list[Weighted]:
    """The adapters in the order given.

    Args:
        adapters: one folder or Hub id, a list of them, or name -> folder or Hub id. Without names the last parts of
            the paths are the names.
        weights: a factor for each, in the same order or by name; None: 1 each.

    Raises:
        ActValueError: no adapter; weights that are not finite, or not one for each adapter.
        ActTypeError: anything else for either.
    """
    if isinstance(adapters, Mapping):
        named = [(str(name), os.fspath(location)) for name, location in adapters.items()]
    else:
        listed = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
        if not isinstance(listed, Sequence) or not all(isinstance(one, (str, os.PathLike)) for one in listed):
            raise ActTypeError(f"adapters: got {str(adapters)[:80]}, expected a folder or Hub id, or a list of them")
        named = [(os.path.basename(os.path.normpath(one)), os.fspath(one)) for one in listed]
    if not named:
        raise ActValueError("adapters: got none, expected at least one adapter")
    factors = checked_weights([name for name, _ in named], weights)
    return [Weighted(name, location, factor) for (name, location), factor in zip(named, factors, strict=True)]


def checked_weights(names: Sequence[str], weights: Any) -> list[float]:
    """One finite factor for each name.

    Args:
        names: of the adapters.
        weights: factors in the same order, name -> factor, a single factor for a single adapter, or None: 1 each.

    Raises:
        ActValueError: not one for each adapter; a factor that is not finite.
        ActTypeError: a factor that is no number.
    """
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Mapping):
        if len(weights) != len(names) or set(weights) != set(names):
            raise ActValueError(f"weights: got {sorted(map(str, weights))}, expected one for each of {list(names)}")
        weights = [weights[name] for name in names]
    factors = list(weights) if isinstance(weights, Sequence) else [weights]
    if len(factors) != len(names):
        raise ActValueError(f"weights: got {len(factors)}, expected one for each of the {len(names)} adapters")
    return [finite_number(factor, "weights") for factor in factors]
