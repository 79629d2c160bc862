"""Stability: whether other samples, or other fine-tunes, give the same channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from act_peft.analysis.agreement import common_channels, select
from act_peft.analysis.disentanglement import Disentanglement, measure_disentanglement
from act_peft.analysis.marks import mark
from act_peft.analysis.tables import Table, percent
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Normalization, Scope
from act_peft.checks import ascending, finite_number, member_of, whole_number
from act_peft.errors import ActValueError

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Stability(Table):
    """How far the masks of several runs agree; `print` shows the matrix.

    Attributes:
        masks: what the masks share.
        density: density of the masks.
        scope: as in `ChannelScores.top`.
    """

    masks: Disentanglement
    density: float
    scope: Scope

    @property
    def title(self) -> str:
        """What was found, in one line."""
        return (
            f"the top {percent(self.density)} of {len(self.masks.names)} runs overlap by "
            f"{percent(self.masks.mean_jaccard)} on average (chance {percent(self.masks.mean_chance)})"
        )

    def records(self) -> list[dict[str, Any]]:
        """One row for each run."""
        return self.masks.records()


@dataclass(frozen=True)
class CurvePoint:
    """Two runs over as many samples each.

    Attributes:
        num_samples: samples of each run.
        jaccard: overlap of their masks.
    """

    num_samples: int
    jaccard: float


@dataclass(frozen=True)
class SampleCurve(Table):
    """How the overlap of two runs grows with their samples; `print` shows it.

    Attributes:
        points: samples ascending.
        chance: overlap of random masks.
        density: density of the masks.
        scope: as in `ChannelScores.top`.
        measured: whether two runs were compared. Otherwise the overlap is predicted from standard errors.
        seed: seed of the prediction.
    """

    points: tuple[CurvePoint, ...]
    chance: float
    density: float
    scope: Scope
    measured: bool
    seed: int | None = None

    def enough(self, jaccard: float = 0.8) -> int | None:
        """The smallest number of samples from which on two runs overlap at least so much; None if none does."""
        found = None
        for point in reversed(self.points):
            if point.jaccard < jaccard:
                break
            found = point.num_samples
        return found

    @property
    def title(self) -> str:
        """What was found, in one line."""
        last = self.points[-1]
        how = "overlap" if self.measured else "would overlap"
        return (
            f"the top {percent(self.density)} of two runs of {last.num_samples} samples {how} by "
            f"{percent(last.jaccard)} (chance {percent(self.chance)})"
        )

    def records(self) -> list[dict[str, Any]]:
        """One row for each number of samples."""
        return [{"samples": point.num_samples, "jaccard": point.jaccard} for point in self.points]


def measure_stability(
    runs: Mapping[str, ChannelScores],
    *,
    density: float = 0.05,
    scope: str | Scope = Scope.MODULE,
    normalize: str | Normalization = Normalization.NONE,
) -> Stability:
    """Compare the masks of several runs: other samples of the ability, other fine-tunes, other seeds.

    Our definition, because the paper's is not public: the Jaccard overlap of masks of equal density.

    Args:
        runs: name -> scores of the same modules, at least two.
        density: as in `ChannelScores.top`, above 0.
        scope: as there.
        normalize: as there.

    Raises:
        ActTypeError, ActValueError: as `measure_agreement`.

    Example:
        >>> from act_peft.analysis import measure_stability
        >>> halves = {str(i): localize(base, donor, [batch]) for i, batch in enumerate(batches)}
        >>> 0 <= measure_stability(halves).masks.mean_jaccard <= 1
        True
    """
    density, scope = _settings(density, scope)
    masks = {title: select(v, density, scope, normalize) for title, v in common_channels(runs).items()}
    return Stability(measure_disentanglement(masks), density, scope)


def measure_sample_curve(
    parts: Sequence[ChannelScores],
    *,
    density: float = 0.05,
    scope: str | Scope = Scope.MODULE,
    normalize: str | Normalization = Normalization.NONE,
) -> SampleCurve:
    """How many samples are enough, measured: two runs over growing numbers of samples that they do not share.

    The parts are dealt out to two runs in turns, as cards are. The first m parts of one are compared with the first
    m of the other.

    Args:
        parts: scores of disjoint samples of one ability, with known numbers of samples; at least two.
        density: as in `ChannelScores.top`, above 0.
        scope: as there.
        normalize: as there.

    Raises:
        ActTypeError, ActValueError: as `measure_agreement`; scores without a number of samples.

    Example:
        >>> from act_peft.analysis import measure_sample_curve
        >>> curve = measure_sample_curve([localize(base, donor, [batch]) for batch in batches])
        >>> [point.num_samples for point in curve.points]
        [2]
    """
    density, scope = _settings(density, scope)
    common_channels({str(number): part for number, part in enumerate(parts)})  # for its checks
    for number, part in enumerate(parts):
        _num_samples(part, f"part {number}")
    one, other = (list(accumulate(parts[start : len(parts) // 2 * 2 : 2], lambda a, b: a + b)) for start in (0, 1))
    points, chance = [], 0.0
    for a, b in zip(one, other, strict=True):
        found = common_channels({"a": a, "b": b})
        jaccard, chance = _overlap({title: select(v, density, scope, normalize) for title, v in found.items()})
        points.append(CurvePoint((_num_samples(a, "") + _num_samples(b, "")) // 2, jaccard))
    return SampleCurve(tuple(points), chance, density, scope, measured=True)


def predict_overlap(
    scores: ChannelScores,
    *,
    density: float = 0.05,
    scope: str | Scope = Scope.MODULE,
    normalize: str | Normalization = Normalization.NONE,
    factors: Iterable[float] = FACTORS,
    draws: int = 2,
    seed: int = 0,
) -> SampleCurve:
    """How many samples are enough, predicted from a single run: the overlap that a second run would have.

    Two runs are drawn around the same true scores, with normal errors of the size of the standard errors. The true
    scores are estimated by shrinking the scores of a module towards their mean by the part of their variance that the
    errors explain. Errors of different channels count as independent; what moves all channels of a module together
    hardly changes their order.

    Args:
        scores: by activation, of at least two samples.
        density: as in `ChannelScores.top`, above 0.
        scope: as there.
        normalize: as there.
        factors: numbers of samples to predict for, as multiples of those of `scores`, above 0.
        draws: pairs of runs drawn for each, at least 1.
        seed: seed of the draws.

    Raises:
        ActTypeError, ActValueError: scores without standard errors; an unknown setting.

    Example:
        >>> from act_peft.analysis import predict_overlap
        >>> curve = predict_overlap(scores, factors=(0.5, 1, 2))
        >>> [point.num_samples for point in curve.points]
        [2, 4, 8]
    """
    density, scope = _settings(density, scope)
    wanted = ascending(list(factors), "factors", above=0)
    draws, seed = whole_number(draws, "draws", least=1), whole_number(seed, "seed", least=0)
    samples, errors = _num_samples(scores, "scores"), scores.standard_errors
    if errors is None:
        raise ActValueError("scores: got those of a single sample, expected at least two, which have standard errors")
    centre = {}
    for name, count in scores.num_comparable.items():
        centre[name] = _shrunk(scores[name][:count], errors[name][:count])
    generator = torch.Generator().manual_seed(seed)
    points, chance = [], 0.0
    for factor in wanted:
        found = []
        for _ in range(draws):
            masks = {
                title: select(
                    {name: _drawn(v, errors[name], math.sqrt(factor), generator) for name, v in centre.items()},
                    density,
                    scope,
                    normalize,
                )
                for title in ("a", "b")
            }
            jaccard, chance = _overlap(masks)
            found.append(jaccard)
        points.append(CurvePoint(max(round(factor * samples), 1), sum(found) / draws))
    return SampleCurve(tuple(points), chance, density, scope, measured=False, seed=seed)


def _shrunk(values: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    mean = values.mean()
    variance = float((values - mean).square().mean())
    kept = max(0.0, 1 - float(errors.square().mean()) / variance) if variance else 0.0
    return mean + math.sqrt(kept) * (values - mean)


def _drawn(
    values: torch.Tensor, errors: torch.Tensor, root_of_factor: float, generator: torch.Generator
) -> torch.Tensor:
    noise = torch.randn(values.numel(), generator=generator, dtype=torch.float64)
    return (values + noise * errors[: values.numel()] / root_of_factor).clamp_min_(0)


def _overlap(masks: Mapping[str, Any]) -> tuple[float, float]:
    """Jaccard overlap of two masks, and that of random ones."""
    marks = mark(masks)
    return float(marks.jaccard(marks.shared())[0, 1]), float(marks.jaccard(marks.shared_by_chance())[0, 1])


def _settings(density: float, scope: str | Scope) -> tuple[float, Scope]:
    return finite_number(density, "density", above=0, most=1), member_of(Scope, scope, "scope")


def _num_samples(scores: ChannelScores, what: str) -> int:
    if scores.num_samples is None:
        raise ActValueError(
            f"{what}: got scores that do not know their number of samples, expected scores by activation of this "
            "version (localize again)"
        )
    return scores.num_samples
