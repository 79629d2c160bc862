"""Agreement of kinds of scores: whether activations, weights and attributions choose the same channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.analysis.disentanglement import Disentanglement, measure_disentanglement
from act_peft.analysis.tables import Table, percent
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Normalization, Scope, select_channels
from act_peft.checks import finite_number, member_of
from act_peft.errors import ActTypeError, ActValueError


@dataclass(frozen=True)
class Agreement(Table):
    """How far several scores of the same channels agree; `print` shows the matrix.

    Attributes:
        masks: what the masks of equal density share.
        rank_correlation: Spearman's rank correlation within a module, averaged over modules by their channels, for
            each pair; n rows of n.
        density: density of the masks.
        scope: as in `ChannelScores.top`.
    """

    masks: Disentanglement
    rank_correlation: tuple[tuple[float, ...], ...]
    density: float
    scope: Scope

    @property
    def title(self) -> str:
        """What was found, in one line."""
        return (
            f"masks of {percent(self.density)} by {', '.join(self.masks.names)} overlap by "
            f"{percent(self.masks.mean_jaccard)} on average (chance {percent(self.masks.mean_chance)})"
        )

    def records(self) -> list[dict[str, Any]]:
        """One row for each pair."""
        names = self.masks.names
        return [
            {
                "first": names[a],
                "second": names[b],
                "jaccard": self.masks.jaccard[a][b],
                "chance": self.masks.chance[a][b],
                "rank correlation": self.rank_correlation[a][b],
            }
            for a in range(len(names))
            for b in range(a + 1, len(names))
        ]


def measure_agreement(
    scores: Mapping[str, ChannelScores], *, density: float = 0.05, scope: str | Scope = Scope.MODULE
) -> Agreement:
    """Compare scores of the same channels, such as those by activation, weight and attribution.

    Only modules that all scores have are compared, and of them only channels that are comparable in all.

    Args:
        scores: name -> scores, at least two.
        density: share of the channels that each mask selects, above 0 and at most 1.
        scope: as in `ChannelScores.top`.

    Raises:
        ActTypeError: no dict of scores.
        ActValueError: fewer than two, no common module, numbers of channels that differ, an unknown setting.

    Example:
        >>> from act_peft.analysis import measure_agreement
        >>> by_weight = localize(base, donor, score="weight")
        >>> agreement = measure_agreement({"activation": scores, "weight": by_weight}, density=0.05)
        >>> agreement.masks.jaccard[0][1] < 1
        True
    """
    density = finite_number(density, "density", above=0, most=1)
    scope = member_of(Scope, scope, "scope")
    common = common_channels(scores)
    masks = {title: select(values, density, scope) for title, values in common.items()}
    values = list(common.values())
    correlation = [[_rank_correlation(a, b) for b in values] for a in values]
    return Agreement(measure_disentanglement(masks), tuple(map(tuple, correlation)), density, scope)


def select(
    values: Mapping[str, torch.Tensor],
    density: float,
    scope: Scope,
    normalize: str | Normalization = Normalization.NONE,
) -> ChannelMask:
    """The mask of the highest of some scores, all of them comparable, without a warning."""
    comparable = {name: found.numel() for name, found in values.items()}
    return select_channels(values, comparable, density, scope=scope, normalize=normalize)


def common_channels(scores: Mapping[str, ChannelScores]) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> module -> scores of the channels that all of several scores have.

    Raises:
        ActTypeError: no dict of scores.
        ActValueError: fewer than two, no common module, numbers of channels that differ.
    """
    if not isinstance(scores, Mapping) or not all(isinstance(found, ChannelScores) for found in scores.values()):
        raise ActTypeError("scores: got something else than scores by name, expected a dict of ChannelScores")
    if len(scores) < 2:
        raise ActValueError(f"scores: got {len(scores)}, expected at least two to compare")
    first, *others = scores.values()
    names = [name for name in first if all(name in other for other in others)]
    if not names:
        raise ActValueError("scores: got no module that all of them have, expected scores of the same model")
    for title, found in scores.items():
        for name in names:
            if found.num_channels[name] != first.num_channels[name]:
                raise ActValueError(
                    f"{name}: got {first.num_channels[name]} channels in one of the scores and "
                    f"{found.num_channels[name]} in {title}, expected scores of the same model"
                )
    least = {name: min(found.num_comparable[name] for found in scores.values()) for name in names}
    return {title: {name: found[name][: least[name]] for name in names} for title, found in scores.items()}


def _rank_correlation(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    total = weight = 0.0
    for name, values in first.items():
        a, b = (_ranks(v) - (v.numel() + 1) / 2 for v in (values, second[name]))
        scale = float((a.square().sum() * b.square().sum()).sqrt())
        if scale:  # scores that are all equal have no order
            total += values.numel() * float(a @ b) / scale
            weight += values.numel()
    return total / weight if weight else float("nan")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1, equal values share the mean of theirs; float64 `[C]`."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
