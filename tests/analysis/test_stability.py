from __future__ import annotations

import pytest
import torch

from act_peft.analysis import measure_sample_curve, measure_stability, predict_overlap
from act_peft.analysis.stability import CurvePoint, SampleCurve
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Scope
from act_peft.channels.spread import Spread
from act_peft.errors import ActValueError

CHANNELS, MODULES = 400, 4


def true_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.up": torch.randn(CHANNELS, generator=generator).exp().double() for i in range(MODULES)}


def run(samples, seed, *, noise=3.0):
    """Scores of a run over samples of one token each, around the same true scores."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: (v * (1 + noise * torch.rand(samples, CHANNELS, generator=generator, dtype=torch.float64)))
        for name, v in true_scores().items()
    }  # [samples, C]
    sums = {name: values.sum(0) for name, values in drawn.items()}
    squares = {name: values.square().sum(0) for name, values in drawn.items()}
    return ChannelScores(sums, samples, spread=Spread(squares, sums, samples, samples))


def test_stability_is_the_overlap_of_the_masks():
    runs = {str(seed): run(8, seed) for seed in range(3)}
    found = measure_stability(runs, density=0.1)
    masks = [scores.top(0.1, scope="module") for scores in runs.values()]
    assert found.masks.jaccard[0][2] == pytest.approx(masks[0].jaccard(masks[2]))
    assert found.masks.names == ("0", "1", "2")
    assert len(found.records()) == 3
    assert "the top 10% of 3 runs overlap by" in found.title
    whole = measure_stability(runs, density=0.1, scope="global", normalize="rms")
    masks = [scores.top(0.1, normalize="rms") for scores in runs.values()]
    assert whole.masks.jaccard[0][1] == pytest.approx(masks[0].jaccard(masks[1]))


def test_the_curve_compares_disjoint_runs_of_growing_size():
    parts = [run(4, seed) for seed in range(7)]
    curve = measure_sample_curve(parts, density=0.1)
    assert [point.num_samples for point in curve.points] == [4, 8, 12]  # the seventh part has no partner
    one, other = parts[0] + parts[2] + parts[4], parts[1] + parts[3] + parts[5]
    assert curve.points[2].jaccard == pytest.approx(
        one.top(0.1, scope="module").jaccard(other.top(0.1, scope="module"))
    )
    assert curve.points[0].jaccard < curve.points[2].jaccard
    assert curve.chance == pytest.approx(0.1 / 1.9)
    assert curve.measured


@pytest.mark.parametrize("samples", [4, 16])
def test_the_prediction_is_what_a_second_run_gives(samples):
    """Within .06: the mean over ten pairs of runs itself has an error of about .02."""
    predicted = [predict_overlap(run(samples, seed), density=0.1, factors=[1, 4]) for seed in range(10)]
    for number, factor in enumerate((1, 4)):
        measured = [
            run(factor * samples, 100 + seed)
            .top(0.1, scope="module")
            .jaccard(run(factor * samples, 200 + seed).top(0.1, scope="module"))
            for seed in range(10)
        ]
        found = [curve.points[number].jaccard for curve in predicted]
        assert sum(found) / 10 == pytest.approx(sum(measured) / 10, abs=0.06)
        assert predicted[0].points[number].num_samples == factor * samples
    assert not predicted[0].measured
    assert predicted[0] == predict_overlap(run(samples, 0), density=0.1, factors=[1, 4])


def test_scores_of_pure_noise_predict_chance():
    flat = {"m": torch.ones(2000).double()}
    generator = torch.Generator().manual_seed(0)
    drawn = 1 + torch.rand(9, 2000, generator=generator, dtype=torch.float64)
    scores = ChannelScores(
        {"m": drawn.sum(0)}, 9, spread=Spread({"m": drawn.square().sum(0)}, {"m": drawn.sum(0)}, 9, 9)
    )
    curve = predict_overlap(scores, density=0.1, factors=[1])
    assert curve.points[0].jaccard == pytest.approx(curve.chance, abs=0.04)
    still = ChannelScores(flat, 9, spread=Spread({"m": flat["m"] / 9}, {"m": flat["m"]}, 9, 9))
    assert predict_overlap(still, density=0.1, factors=[1]).points[0].jaccard == 1  # no error, no difference


def test_enough():
    points = tuple(CurvePoint(n, j) for n, j in ((1, 0.85), (2, 0.7), (4, 0.8), (8, 0.9)))
    curve = SampleCurve(points, 0.05, 0.1, Scope.MODULE, measured=True)
    assert (curve.enough(), curve.enough(0.9), curve.enough(0.95), curve.enough(0.5)) == (4, 8, None, 1)
    assert curve.title == "the top 10% of two runs of 8 samples overlap by 90% (chance 5%)"
    assert curve.records()[0] == {"samples": 1, "jaccard": 0.85}


def test_wrong_arguments():
    old = ChannelScores(true_scores(), 4)
    with pytest.raises(ActValueError, match="part 1: got scores that do not know their number of samples"):
        measure_sample_curve([run(4, 0), old])
    with pytest.raises(ActValueError, match="scores: got scores that do not know their number of samples"):
        predict_overlap(old)
    with pytest.raises(ActValueError, match="scores: got those of a single sample, expected at least two"):
        predict_overlap(run(1, 0))
    with pytest.raises(ActValueError, match="scores: got 1, expected at least two"):
        measure_sample_curve([run(4, 0)])
    with pytest.raises(ActValueError, match=r"factors: got 0.*above 0"):
        predict_overlap(run(4, 0), factors=[0])
