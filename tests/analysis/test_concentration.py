from __future__ import annotations

import pytest
import torch

from act_peft.analysis import concentration, measure_concentration
from act_peft.analysis.concentration import complementary_distribution
from act_peft.channels.scores import ChannelScores
from act_peft.errors import ActTypeError, ActValueError


def gini_by_pairs(values):
    return sum(abs(a - b) for a in values for b in values) / (2 * len(values) * sum(values))


def test_against_a_loop(random_scores):
    scores = random_scores()
    found = measure_concentration(scores, shares=(0.1, 0.5, 1))
    groups = {"all": list(scores)} | {k: [n for n in scores if n.endswith(k)] for k in ("q_proj", "lm_head")}
    for name, modules in groups.items():
        values = sorted((v for module in modules for v in scores[module].tolist()), reverse=True)
        group = found.overall if name == "all" else found.kinds[name]
        assert group.num_channels == len(values)
        assert group.total == pytest.approx(sum(values))
        assert group.gini == pytest.approx(gini_by_pairs(values))
        assert group.largest == values[0]
        for share, part in group.top.items():
            assert part == pytest.approx(sum(values[: round(share * len(values))]) / sum(values))
    assert list(found.layers) == ["layer 0", "layer 1", "layer 2", "lm_head"]
    assert sum(group.num_channels for group in found.layers.values()) == found.overall.num_channels


def test_known_answers():
    one = measure_concentration(ChannelScores({"m": torch.tensor([0.0] * 99 + [5.0])}, 1), shares=[0.01])
    assert one.overall.gini == pytest.approx(0.99)
    assert one.overall.top == {0.01: 1.0}
    equal = measure_concentration(ChannelScores({"m": torch.ones(100)}, 1), shares=[0.05])
    assert equal.overall.gini == pytest.approx(0)
    assert equal.overall.top[0.05] == pytest.approx(0.05)
    assert equal.title == "of 100 channels the top 5% hold 5% of the sum of scores by activation"


def test_scores_of_zero_and_below():
    zero = measure_concentration(ChannelScores({"m": torch.zeros(4)}, 1))
    assert (zero.overall.gini, zero.overall.top[0.1], zero.overall.total) == (0, 0, 0)
    assert zero.records()[0]["share of sum"] is None
    harm = measure_concentration(ChannelScores({"m": torch.tensor([3.0, -9.0, 1.0, 0.0])}, 1, kind="attribution"))
    assert harm.overall.total == 4
    assert harm.overall.gini == pytest.approx(gini_by_pairs([3, 0, 1, 0]))


def test_channels_that_are_not_comparable_do_not_count():
    scores = ChannelScores({"m": torch.tensor([1.0, 3.0, 0, 0])}, 1, num_comparable={"m": 2})
    assert measure_concentration(scores, shares=[0.5]).overall.top == {0.5: 0.75}


@pytest.mark.parametrize(
    ("shares", "error"),
    [((0, 0.1), ActValueError), ((1.5,), ActValueError), ("0.1", ActTypeError), ((), ActValueError)],
)
def test_wrong_shares(random_scores, shares, error):
    with pytest.raises(error, match="shares"):
        measure_concentration(random_scores(), shares=shares)


class TestDistribution:
    def test_is_complementary(self):
        values = torch.tensor([3.0, 1.0, 0.0, 2.0], dtype=torch.float64)
        assert complementary_distribution(values) == ([1.0, 2.0, 3.0], [0.75, 0.5, 0.25])

    def test_of_many_channels_keeps_both_ends_and_lies_on_the_distribution(self):
        values = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
        values[:5000] = 0
        scores, share = complementary_distribution(values)
        assert 100 < len(scores) <= concentration.POINTS
        assert (scores[0], scores[-1]) == (values[values > 0].min(), values.max())
        assert share == [pytest.approx(float((values >= score).double().mean())) for score in scores]

    def test_of_zeros_is_empty(self):
        assert complementary_distribution(torch.zeros(3, dtype=torch.float64)) == ([], [])
