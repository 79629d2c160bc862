"""Concentration: in how few channels the differences sit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.analysis.groups import Grouping, groups_of
from act_peft.analysis.tables import Table, percent
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.channels.selection import Scope
from act_peft.checks import ascending

SHARES = (0.01, 0.05, 0.1)
POINTS = 400  # of a curve; more would not be visible


@dataclass(frozen=True)
class GroupConcentration:
    """The scores of a group of channels.

    Attributes:
        num_channels: number of its channels.
        total: sum of its scores; negative ones (attributions) count as 0.
        median: the middle score.
        largest: the greatest score.
        gini: Gini coefficient of the scores, from 0 (all equal) towards 1 (a single channel has everything).
        top: share p -> share of the sum that the round(p * channels) greatest scores hold.
    """

    num_channels: int
    total: float
    median: float
    largest: float
    gini: float
    top: Mapping[float, float]


@dataclass(frozen=True)
class Concentration(Table):
    """How concentrated scores are: over all channels, by kind of module, by layer. `print` shows the table.

    Attributes:
        overall: all channels together.
        kinds: kind -> its channels.
        layers: layer -> its channels.
        score: the kind of score.
        num_tokens: number of tokens in the scores.
        num_samples: number of samples in the scores, if it is known.
    """

    overall: GroupConcentration
    kinds: Mapping[str, GroupConcentration]
    layers: Mapping[str, GroupConcentration]
    score: ScoreKind
    num_tokens: int
    num_samples: int | None

    @property
    def title(self) -> str:
        """What was found, in one line."""
        held = ", ".join(f"{percent(share)} hold {percent(part)}" for share, part in self.overall.top.items())
        return f"of {self.overall.num_channels:,} channels the top {held} of the sum of scores by {self.score.value}"

    def records(self) -> list[dict[str, Any]]:
        """One row for all channels, then one for each kind and each layer."""
        named = {"all": self.overall, **self.kinds, **self.layers}
        return [
            {
                "channels of": name,
                "number": group.num_channels,
                "share of sum": group.total / self.overall.total if self.overall.total else None,
                **{f"top {percent(share)}": part for share, part in group.top.items()},
                "gini": group.gini,
                "median": group.median,
                "largest": group.largest,
            }
            for name, group in named.items()
        ]


def measure_concentration(scores: ChannelScores, *, shares: Iterable[float] = SHARES) -> Concentration:
    """How much of the scores a few channels hold.

    Only comparable channels count. Negative scores (attributions of channels that would do harm) count as 0.

    Args:
        scores: from `localize`, or the gains of a fit.
        shares: the shares p of the greatest channels, each above 0 and at most 1.

    Returns:
        Numbers for all channels, for each kind of module and for each layer.

    Raises:
        ActTypeError, ActValueError: `shares` are no numbers in this range.

    Example:
        >>> from act_peft.analysis import measure_concentration
        >>> print(measure_concentration(scores).title)  # doctest: +ELLIPSIS
        of ... channels the top 1% hold ...
    """
    wanted = ascending(list(shares), "shares", above=0, most=1)
    comparable = comparable_scores(scores)
    by_group = [group_scores(comparable, grouping) for grouping in (Grouping.KIND, Grouping.LAYER)]
    kinds, layers = ({name: _measure(v, wanted) for name, v in groups.items()} for groups in by_group)
    return Concentration(
        overall=_measure(torch.cat(list(comparable.values())), wanted),
        kinds=kinds,
        layers=layers,
        score=scores.kind,
        num_tokens=scores.num_tokens,
        num_samples=scores.num_samples,
    )


def comparable_scores(scores: ChannelScores) -> dict[str, torch.Tensor]:
    """Module name -> the scores of its comparable channels, float64."""
    return {name: values[: scores.num_comparable[name]] for name, values in scores.items()}


def group_scores(scores: Mapping[str, torch.Tensor], grouping: Grouping) -> dict[str, torch.Tensor]:
    """Group -> the scores of its channels, in the model's order."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, group in groups_of(scores, grouping).items():
        groups.setdefault(group, []).append(scores[name])
    return {name: torch.cat(parts) for name, parts in groups.items()}


def complementary_distribution(values: torch.Tensor) -> tuple[list[float], list[float]]:
    """Positive scores in rising order, and for each the share of all channels with at least this score.

    For many channels it is thinned out to `POINTS` points, evenly spaced in the logarithm of the share.

    Args:
        values: scores `[C]`.
    """
    ordered = values.sort().values
    ordered = ordered[torch.searchsorted(ordered, 0.0, right=True) :]
    count = ordered.numel()
    if count > POINTS:
        wanted = torch.logspace(0, -torch.tensor(float(count)).log10(), POINTS, dtype=torch.float64)
        chosen = (count - (wanted * count).round().long()).clamp(0, count - 1).unique()
    else:
        chosen = torch.arange(count)
    return ordered[chosen].tolist(), ((count - chosen).double() / values.numel()).tolist()


def share_of_top(values: Sequence[torch.Tensor], density: float, scope: Scope) -> float:
    """The share of the sum that the highest of some scores hold.

    Args:
        values: the scores of every module; negative ones count as 0.
        density: share of the channels.
        scope: whether they are the highest of all, or of every module.
    """
    groups = [torch.cat(list(values))] if scope is Scope.GLOBAL else values
    groups = [v.clamp_min(0) for v in groups]
    total = sum(float(v.sum()) for v in groups)
    held = sum(float(v.topk(round(density * v.numel())).values.sum()) for v in groups)
    return held / total if total else 0.0


def _measure(values: torch.Tensor, shares: Iterable[float]) -> GroupConcentration:
    ordered = values.clamp_min(0).sort().values  # [C], rising
    count, total = ordered.numel(), float(ordered.sum())
    held = ordered.flip(0).cumsum(0)  # of the 1, 2, ... greatest

    def part(share: float) -> float:
        number = round(share * count)
        return float(held[number - 1]) / total if number and total else 0.0

    rank = torch.arange(1, count + 1, dtype=torch.float64)
    gini = float(((2 * rank - count - 1) * ordered).sum()) / (count * total) if total else 0.0
    return GroupConcentration(
        num_channels=count,
        total=total,
        median=float(values.median()),
        largest=float(values.max()),
        gini=gini,
        top={share: part(share) for share in shares},
    )
