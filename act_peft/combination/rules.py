"""The arithmetic of combining the deltas of one module, without models and files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from act_peft.channels.rows import wide_dtype
from act_peft.checks import finite_number, member_of
from act_peft.doors import DENSITY_WARNING, merge_utils
from act_peft.errors import ActValueError


class CombinationType(Enum):
    """The delta of a channel that several adapters change, from their weights w and deltas d.

    LINEAR: Σ wᵢ dᵢ (eq. 5 of arXiv 2601.09398). SUM: an alias of LINEAR, the same result under a second name.
    MEAN: Σ wᵢ dᵢ / n over the n adapters that have the channel. FIRST: w d of the first of these adapters, in the
    order of the argument. LARGER: the w d with the largest Euclidean norm in this channel; the first among equals.
    TIES (arXiv 2306.01708), DARE_LINEAR, DARE_TIES (arXiv 2311.03099) and MAGNITUDE_PRUNE: PEFT's functions of these
    names.
    """

    LINEAR = "linear"
    SUM = "sum"
    MEAN = "mean"
    FIRST = "first"
    LARGER = "larger"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"


class MajoritySign(Enum):
    """The election of the sign of an element in TIES: by the sum of the values, or by the number of adapters."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True)
class Rule:
    """The checked settings of a combination, from `make_rule`."""

    combination_type: CombinationType
    density: float | None
    majority_sign: MajoritySign


@dataclass(frozen=True)
class WeightedRows:
    """One adapter in one module: channels int64 `[K]`, ascending, their deltas `[K, I]`, and the adapter's weight."""

    index: torch.Tensor
    rows: torch.Tensor
    weight: float


_OF_FACTORS = ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
_PRUNING = (
    CombinationType.TIES,
    CombinationType.DARE_LINEAR,
    CombinationType.DARE_TIES,
    CombinationType.MAGNITUDE_PRUNE,
)
_ELECTING = (CombinationType.TIES, CombinationType.DARE_TIES)


def make_rule(
    combination_type: str | CombinationType,
    *,
    density: float | None = None,
    majority_sign_method: str | MajoritySign = MajoritySign.TOTAL,
) -> Rule:
    """Check the settings of a combination.

    Args:
        combination_type: a `CombinationType` or its value.
        density: share of the values that pruning keeps, in (0, 1]; required by the pruning types, refused by others.
        majority_sign_method: a `MajoritySign` or its value; other than `"total"` only for `"ties"` and `"dare_ties"`.

    Raises:
        ActValueError: an unknown type or method, a missing or unused density, a density outside (0, 1].
        ActTypeError: a density that is no number.
    """
    if combination_type in _OF_FACTORS:
        raise ActValueError(
            f"combination_type: got {combination_type!r}, which combines the factors of LoRA adapters, but rows have "
            "no factors; expected a type for whole deltas (take 'linear', which is exact for rows, or the same type "
            "without '_svd')"
        )
    choice = member_of(CombinationType, combination_type, "combination_type")
    sign = member_of(MajoritySign, majority_sign_method, "majority_sign_method")
    if sign is not MajoritySign.TOTAL and choice not in _ELECTING:
        raise ActValueError(
            f"majority_sign_method: got {sign.value!r} with combination_type={choice.value!r}, which elects no sign "
            "(leave it out, or take 'ties' or 'dare_ties')"
        )
    if choice not in _PRUNING:
        if density is not None:
            raise ActValueError(
                f"density: got {density!r} with combination_type={choice.value!r}, which prunes nothing (leave it out)"
            )
        return Rule(choice, None, sign)
    if density is None:
        raise ActValueError(
            f"density: got none, expected the share of values in (0, 1] that {choice.value!r} keeps (for example 0.5)"
        )
    return Rule(choice, finite_number(density, "density", above=0, most=1), sign)


def union_index(indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The channels of all adapters: int64 `[K]`, ascending."""
    return torch.cat(list(indices)).unique()  # sorted


def combined_rows(parts: Sequence[WeightedRows], rule: Rule) -> torch.Tensor:
    """The rows of a combined adapter for one module, for the channels `union_index`.

        combined[i] = w d[i]                                   channels of one adapter only, with every rule
        combined[i] = rule(w₁ d₁[i], w₂ d₂[i], ...)            channels of several adapters

    Pruning and the election of signs affect shared channels only. For every set of adapters that share channels,
    PEFT's functions get one tensor `[S, I]` per adapter with the rows of these S channels, and keep the share
    `density` of each. DARE uses torch's global random generator, as in PEFT (`torch.manual_seed`).
    Sum and mean do not depend on the order of `parts`, not even in the last bit.

    Args:
        parts: the rows of each adapter, in the order of the user's argument; I is the same for all.
        rule: from `make_rule`.

    Returns:
        `[K, I]` in `wide_dtype` of the rows.
    """
    wide = wide_dtype(*(part.rows.dtype for part in parts))
    index = union_index([part.index for part in parts])
    places = [torch.searchsorted(index, part.index) for part in parts]
    combined = torch.zeros(index.numel(), parts[0].rows.shape[1], dtype=wide)
    holds = torch.zeros(len(parts), index.numel(), dtype=torch.bool)
    for held, place in zip(holds, places, strict=True):
        held[place] = True
    for owners, channels in _groups(holds):
        rows = [parts[i].rows[torch.searchsorted(places[i], channels)].to(wide) for i in owners]  # [S, I] each
        weights = torch.tensor([parts[i].weight for i in owners], dtype=wide)
        if len(owners) == 1:
            combined[channels] = rows[0] * weights
        else:
            combined[channels] = _FUNCTIONS[rule.combination_type](rows, weights, rule)
    return combined


def _groups(holds: torch.Tensor) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Each set of adapters that share channels, and these channels; `holds` is bool `[adapters, K]`."""
    patterns, group = holds.T.unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        yield pattern.nonzero().squeeze(1).tolist(), (group == number).nonzero().squeeze(1)


# ---------------------------------------------------------------------------------------------------------- rules ---

_Rows = list[torch.Tensor]


def _weighted(rows: _Rows, weights: torch.Tensor) -> torch.Tensor:
    return torch.stack(rows) * weights[:, None, None]  # [n, S, I]


def _sum(rows: _Rows, weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    if len(rows) == 2:
        return rows[0] * weights[0] + rows[1] * weights[1]
    # Sorted, because rounding makes a sum of three and more numbers depend on their order.
    return _weighted(rows, weights).sort(dim=0).values.sum(0)


def _mean(rows: _Rows, weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    return _sum(rows, weights, rule) / len(rows)


def _first(rows: _Rows, weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    return rows[0] * weights[0]


def _larger(rows: _Rows, weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    deltas = _weighted(rows, weights)
    winner = torch.linalg.vector_norm(deltas, dim=2).argmax(0)  # [S]; the first among equals
    return deltas[winner, torch.arange(deltas.shape[1])]


def _by_peft(function: Callable[..., torch.Tensor]) -> Callable[[_Rows, torch.Tensor, Rule], torch.Tensor]:
    def combine(rows: _Rows, weights: torch.Tensor, rule: Rule) -> torch.Tensor:
        settings: dict[str, Any] = {"density": rule.density}
        if rule.combination_type in _ELECTING:
            settings["majority_sign_method"] = rule.majority_sign.value
        with warnings.catch_warnings():
            # A density of 1 is allowed: only the election of signs, without pruning.
            warnings.filterwarnings("ignore", message=DENSITY_WARNING)
            return function(rows, weights, **settings)

    return combine


_FUNCTIONS: dict[CombinationType, Callable[[_Rows, torch.Tensor, Rule], torch.Tensor]] = {
    CombinationType.LINEAR: _sum,
    CombinationType.SUM: _sum,
    CombinationType.MEAN: _mean,
    CombinationType.FIRST: _first,
    CombinationType.LARGER: _larger,
    CombinationType.TIES: _by_peft(merge_utils.ties),
    CombinationType.DARE_LINEAR: _by_peft(merge_utils.dare_linear),
    CombinationType.DARE_TIES: _by_peft(merge_utils.dare_ties),
    CombinationType.MAGNITUDE_PRUNE: _by_peft(merge_utils.magnitude_prune),
}
