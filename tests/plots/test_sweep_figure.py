from __future__ import annotations

import pytest

from act_peft.plots import draw_sweep
from tests.support.figures import finding, make_loss_sweep, make_sweep


def drawn(result):
    figure = draw_sweep(result)
    axes = figure.axes[0]
    return figure, axes, {line.get_label(): line for line in axes.lines}


def points(line):
    return list(zip(*line.get_data(), strict=True))


def test_lines_are_the_numbers():
    result = make_sweep(donor=0.9)
    figure, axes, lines = drawn(result)
    expected = [(row.keep_accuracy, row.ability.accuracy) for row in (result.base, *result.rows)]
    assert points(lines["density 20%"]) == [expected[0], *expected[4:]]
    assert points(lines["base"]) == expected[:1]
    assert points(lines["recommended"]) == [expected[5]]
    assert points(lines["not beaten (Pareto front)"]) == [
        (row.keep_accuracy, row.ability.accuracy) for row in result.front
    ]
    assert [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]] == [
        [pytest.approx(0.88), pytest.approx(0.88)]
    ]
    assert axes.get_xlabel() == "token accuracy on what is kept: German"
    assert finding(figure) == "Recommended: density 0.2, scale 0.6. Ability 50% → 60%, kept 95% → 89%"


def test_a_far_donor_does_not_squeeze_the_settings():
    _, axes, lines = drawn(make_sweep(donor=0.1))
    assert axes.get_xlim()[0] > 0.8
    assert "donor: 10%, 100%" in lines
    assert len(axes.texts) == 2  # the limit and the arrow
    _, axes, lines = drawn(make_sweep(donor=0.9, gain=1.5))  # it is near then, and a point
    assert not any(label.startswith("donor:") for label in lines) or axes.get_ylim()[1] < 1


def test_several_skills_no_donor_and_no_recommendation():
    figure, axes, lines = drawn(make_sweep(("German", "English"), gain=-10, donor=None))
    names = {name for name in lines if not name.startswith("_")}
    assert names == {"base", "not beaten (Pareto front)", "density 10%", "density 20%"}
    assert [line for line in axes.lines if list(line.get_ydata()) == [0, 1]] == []
    assert axes.get_xlabel() == "mean token accuracy on what is kept: German, English"
    assert finding(figure) == "None of 6 settings is worth taking within the limit"


def test_losses_and_other_methods():
    result = make_loss_sweep()
    figure, axes, lines = drawn(result)
    assert list(lines["interpolation"].get_xdata()) == pytest.approx([0.01, 0.06, 0.9])
    assert list(lines["interpolation"].get_ydata()) == pytest.approx([0.805, 0.605, 0.305])
    assert points(lines["recommended"])[0][1] == pytest.approx(0.505)
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # better is to the right, and up
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_xlim()[0] < 0.2  # what is far beyond the limit is left out
    assert (
        figure._suptitle.get_text()
        .replace("\n", " ")
        .startswith("Recommended: fitted, scale 1. Loss on the ability 1.00 → 0.51")
    )
    assert "held-out tokens: ability 2" in figure._supxlabel.get_text()
