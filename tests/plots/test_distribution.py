from __future__ import annotations

import pytest
import torch

from act_peft.channels.scores import ChannelScores
from act_peft.errors import ActTypeError, ActValueError
from act_peft.plots import draw_concentration, draw_distribution
from tests.support.figures import finding, make_scores


def drawn(scores, **settings):
    return draw_distribution(scores, density=0.1, **settings).axes[0]


def test_the_cut_is_the_score_where_the_mask_ends():
    scores = make_scores()
    mask = scores.top(0.1)
    lowest = min(float(scores[name][index].min()) for name, index in mask.items() if len(index))
    axes = drawn(scores)
    assert [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]] == [[lowest, lowest]]
    assert [text.get_text() for text in axes.texts] == ["selected: top 10%"]


def test_the_cut_of_a_share_of_every_module():
    axes = drawn(make_scores(), scope="module")
    assert [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == [0, 1]] == [[0.1, 0.1]]
    assert [text.get_text() for text in axes.texts] == ["selected: top 10% of every module"]
    scores = ChannelScores({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0])}, 1)
    title = draw_distribution(scores, density=0.5, scope="module")._suptitle.get_text()
    assert " ".join(title.split()) == "The top 50% of every module's channels hold 70% of the sum of scores"


def test_the_title_is_the_finding():
    scores = ChannelScores({"m": torch.tensor([7.0, 1.0, 1.0, 1.0])}, 1)
    figure = draw_distribution(scores, density=0.25)
    assert finding(figure) == "The top 25% of all channels hold 70% of the sum of scores"
    curve = draw_concentration(scores, density=0.25)
    assert finding(curve) == "The best 25% of the channels hold 70% of the sum of scores"
    line = curve.axes[0].lines[0]
    assert list(line.get_ydata())[:: len(line.get_ydata()) // 4] == pytest.approx([0, 0.7, 0.8, 0.9, 1])


def test_the_best_of_every_module():
    scores = ChannelScores({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0])}, 1)
    figure = draw_concentration(scores, density=0.5, scope="module")
    title = " ".join(figure._suptitle.get_text().split())
    assert title == "The best 50% of the channels of every module hold 70% of the sum of scores"


def test_the_groups_that_reach_farthest_are_named():
    labels = [text.get_text() for text in drawn(make_scores()).get_legend().get_texts()]
    assert labels[0] == "5 other groups"
    assert labels[-1] == "all (3,956)"
    assert len(labels) == 6
    few = ChannelScores({"a.up": torch.ones(3), "a.down": torch.ones(2)}, 1)
    labels = [text.get_text() for text in drawn(few).get_legend().get_texts()]
    assert labels == ["up (3)", "down (2)", "all (5)"]


@pytest.mark.parametrize("draw", [draw_distribution, draw_concentration])
def test_equal_models_and_single_modules(draw):
    title = finding(draw(ChannelScores({"a": torch.zeros(4)}, 1), density=0.5))
    assert "hold 0% of the sum of scores" in title


@pytest.mark.parametrize("draw", [draw_distribution, draw_concentration])
def test_impossible_settings(draw):
    for density in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ActValueError, match=r"density: got .*, expected a number above 0 and at most 1"):
            draw(make_scores(), density=density)
    with pytest.raises(ActTypeError, match="density: got 'x'"):
        draw(make_scores(), density="x")
    with pytest.raises(ActValueError, match="scope: got 'all', expected one of 'global', 'module'"):
        draw(make_scores(), scope="all")


def test_unknown_grouping():
    with pytest.raises(ActValueError, match="group_by: got 'colour', expected one of 'kind', 'layer'"):
        draw_distribution(make_scores(), group_by="colour")
