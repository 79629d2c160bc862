from __future__ import annotations

import math

import pytest
import torch

from act_peft.analysis import measure_agreement
from act_peft.channels.scores import ChannelScores
from act_peft.errors import ActTypeError, ActValueError


def spearman(a, b):
    """Pearson's correlation of ranks; equal values share their mean rank."""

    def ranks(values):
        return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))


def test_against_a_loop(random_scores):
    activation, weight = random_scores(0), random_scores(1, kind="weight")
    found = measure_agreement({"activation": activation, "weight": weight}, density=0.2)
    one, other = (scores.top(0.2, scope="module") for scores in (activation, weight))
    assert found.masks.jaccard[0][1] == pytest.approx(one.jaccard(other))
    channels = activation.num_channels
    expected = sum(channels[m] * spearman(activation[m].tolist(), weight[m].tolist()) for m in channels)
    assert found.rank_correlation[0][1] == pytest.approx(expected / sum(channels.values()))
    assert found.rank_correlation[0][0] == pytest.approx(1)
    assert found.records()[0]["jaccard"] == found.masks.jaccard[0][1]
    assert "masks of 20% by activation, weight overlap by" in found.title


def test_equal_values_and_common_channels():
    a = ChannelScores({"m": torch.tensor([1.0, 1.0, 2.0, 5.0]), "only": torch.ones(2)}, 1)
    b = ChannelScores({"m": torch.tensor([3.0, 1.0, 2.0, 0.0])}, 1, num_comparable={"m": 3})
    found = measure_agreement({"a": a, "b": b}, density=0.34)
    assert found.rank_correlation[0][1] == pytest.approx(spearman([1, 1, 2], [3, 1, 2]))
    assert found.masks.sizes == (1, 1)
    flat = ChannelScores({"m": torch.ones(4)}, 1)
    assert math.isnan(measure_agreement({"a": a, "flat": flat}, density=0.5).rank_correlation[0][1])


def test_global_scope(random_scores):
    a, b = random_scores(0), random_scores(1)
    found = measure_agreement({"a": a, "b": b}, density=0.1, scope="global")
    assert found.masks.jaccard[0][1] == pytest.approx(a.top(0.1).jaccard(b.top(0.1)))


def test_wrong_arguments(random_scores):
    scores = random_scores()
    with pytest.raises(ActTypeError, match="scores: got something else than scores by name"):
        measure_agreement([scores, scores])
    with pytest.raises(ActValueError, match="scores: got 1, expected at least two"):
        measure_agreement({"a": scores})
    with pytest.raises(ActValueError, match="scores: got no module that all of them have"):
        measure_agreement({"a": scores, "b": ChannelScores({"m": torch.ones(2)}, 1)})
    with pytest.raises(ActValueError, match="lm_head: got 29 channels in one of the scores and 2 in b"):
        measure_agreement({"a": scores, "b": ChannelScores({"lm_head": torch.ones(2)}, 1)})
    with pytest.raises(ActValueError, match="density: got 0"):
        measure_agreement({"a": scores, "b": scores}, density=0)
