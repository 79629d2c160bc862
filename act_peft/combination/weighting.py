"""Parse the `adapters` and `weights` arguments: several adapters with a weight each."""

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
    """The adapters in the order of the argument.

    Args:
        adapters: one folder or Hub id, a list of them, or name -> folder or Hub id. In a list the last part of each
            path is the name.
        weights: a factor for each adapter, in the same order or by name; None means 1 for each.

    Raises:
        ActValueError: no adapter; a weight that is not finite; not exactly one weight for each adapter.
        ActTypeError: an argument of a different type.
    """
    if isinstance(adapters, Mapping):
        named = [(str(name), os.fspath(location)) for name, location in adapters.items()]
    else:
        listed = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
        if not isinstance(listed, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in listed):
            raise ActTypeError(f"adapters: got {str(adapters)[:80]}, expected a folder or Hub id, or a list of them")
        named = [(os.path.basename(os.path.normpath(path)), os.fspath(path)) for path in listed]
    if not named:
        raise ActValueError("adapters: got none, expected at least one adapter")
    factors = checked_weights([name for name, _ in named], weights)
    return [Weighted(name, location, factor) for (name, location), factor in zip(named, factors, strict=True)]


def checked_weights(names: Sequence[str], weights: Any) -> list[float]:
    """One finite factor for each name.

    Args:
        names: names of the adapters.
        weights: factors in the same order; name -> factor; one factor for one adapter; None means 1 for each.

    Raises:
        ActValueError: not exactly one factor for each adapter; a factor that is not finite.
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
