from __future__ import annotations

import pytest

from act_peft.errors import ActValueError
from act_peft.plots import draw_accuracies, draw_demo
from tests.support.figures import ACCURACIES, make_scores


def test_bars_are_the_numbers():
    figure = draw_accuracies(ACCURACIES, title="found 1", highlight="fitted")
    for axes, skill in zip(figure.axes, ("Spanish", "German"), strict=True):
        assert axes.get_title(loc="left") == skill
        assert [bar.get_width() for bar in axes.patches] == [row[skill] for row in ACCURACIES.values()]
    assert [text.get_text() for text in figure.axes[0].texts] == ["6", "99", "92", "95", "40"]
    assert [bool(bar.get_hatch()) for bar in figure.axes[0].patches] == [False, False, False, False, True]


def test_the_demo_has_both():
    figure = draw_demo(make_scores(), ACCURACIES, density=0.5, scope="module", title="found 1", highlight="fitted")
    left, *right = figure.axes
    assert left.get_title(loc="left").startswith("The best 50% of the channels")
    assert [axes.get_title(loc="left") for axes in right] == ["Spanish", "German"]


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ({}, r"accuracies: got \[\], expected the same skills"),
        ({"base": {"a": 1.0}, "donor": {"b": 1.0}}, r"donor: got \['b'\], expected the same skills for every model"),
    ],
)
def test_different_skills(accuracies, message):
    with pytest.raises(ActValueError, match=message):
        draw_accuracies(accuracies, title="found 1")
