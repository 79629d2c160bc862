"""Figures of masks, samples and scales: what is drawn are the numbers."""

from __future__ import annotations

import pytest
import torch

from act_peft.analysis import measure_composition, measure_disentanglement
from act_peft.analysis.stability import CurvePoint, SampleCurve
from act_peft.channels.masks import ChannelMask
from act_peft.channels.selection import Scope
from act_peft.errors import ActValueError
from act_peft.plots import draw_composition, draw_overlaps, draw_sample_curve, draw_scales
from tests.support.figures import finding, make_masks


def caption(figure):
    return " ".join(figure._supxlabel.get_text().split())


def test_composition():
    mask = ChannelMask(
        {"layers.0.up": [0, 1, 2], "layers.1.down": [0]}, {"layers.0.up": 4, "layers.1.down": 2, "h": 4}
    )
    figure = draw_composition(measure_composition(mask), note="density 0.4")
    table = figure.axes[0].images[0].get_array().filled(-1)
    assert table.tolist() == [[0.75, -1, -1], [-1, 0.5, -1], [-1, -1, 0]]
    assert {text.get_text() for text in figure.axes[0].texts} == {"75%", "50%", "0%"}
    assert finding(figure) == "75% of the 4 selected channels are up"
    assert "warning: 75% of the selected channels are up" in caption(figure)
    assert caption(figure).endswith("density 0.4")


def test_an_empty_mask():
    figure = draw_composition(measure_composition(ChannelMask({}, {"layers.0.up": 4})))
    assert finding(figure) == "None of 4 channels is selected"


def test_overlaps():
    found = measure_disentanglement(make_masks())
    figure = draw_overlaps(found, title="found: 1")
    left, right = figure.axes[:2]
    assert left.images[0].get_array().tolist() == [list(row) for row in found.jaccard]
    assert [bar.get_width() for bar in right.patches] == list(found.unique)
    assert list(right.lines[0].get_xdata()) == list(found.unique_by_chance)
    assert finding(figure) == "Found: 1"


def curve(*points, measured=True):
    return SampleCurve(tuple(CurvePoint(n, j) for n, j in points), 0.05, 0.1, Scope.MODULE, measured=measured)


def test_samples():
    figure = draw_sample_curve({"a": curve((2, 0.5), (4, 0.85)), "b": curve((2, 0.4), (4, 0.5), measured=False)})
    lines = figure.axes[0].lines
    assert (list(lines[0].get_xdata()), list(lines[0].get_ydata())) == ([2, 4], [0.5, 0.85])
    assert (lines[0].get_linestyle(), lines[1].get_linestyle()) == ("-", "--")
    assert finding(figure) == "From 4 samples on, two runs share at least 80% of their channels"
    few = draw_sample_curve({"a": curve((2, 0.5), measured=False)})
    assert finding(few) == "2 samples are not enough: two runs share 50% of their channels"
    assert "predicted from the standard errors of one run" in caption(few)


def test_scales():
    figure = draw_scales({"a": torch.tensor([0.0, 0.0, 0.5]), "b": torch.tensor([1.0])})
    assert finding(figure) == "50% of 4 learned scales are 0; the median of the others is 0.50"
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 4
    assert bars[-1].get_height() == 2
    zero = draw_scales({"a": torch.zeros(3)})
    assert finding(zero) == "100% of 3 learned scales are 0"
    with pytest.raises(ActValueError, match="scales: got none, expected at least one"):
        draw_scales({})
