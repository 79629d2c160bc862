"""How the overlap of two runs grows with their samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from act_peft.analysis.stability import SampleCurve
from act_peft.analysis.tables import percent
from act_peft.plots.style import COLOURS, GREY, INK, MARKERS, as_percent, finish, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 0.8


def draw_sample_curve(curves: Mapping[str, SampleCurve], *, enough: float = ENOUGH, note: str = "") -> Figure:
    """Draw the overlap of the masks of two runs against their number of samples.

    Measured curves are solid, predicted ones dashed.

    Args:
        curves: name -> curve, from `measure_sample_curve` or `predict_overlap`; at least one.
        enough: the overlap that counts as enough.
        note: more for the caption, such as the seed.

    Raises:
        ActError: matplotlib is not installed.
    """
    figure = new_figure(6.8, 4.6)
    axes = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        x, y = [point.num_samples for point in curve.points], [point.jaccard for point in curve.points]
        how = "measured" if curve.measured else "predicted"
        axes.plot(
            x,
            y,
            "-" if curve.measured else "--",
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markerfacecolor=COLOURS[number % len(COLOURS)] if curve.measured else "white",
            linewidth=2,
            markersize=6,
            label=f"{name} ({how}, density {percent(curve.density)})",
        )
    first = next(iter(curves.values()))
    axes.axhline(enough, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(first.chance, color=GREY, linewidth=1, linestyle=":")
    place: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 8.5}
    axes.annotate("enough", (0.01, enough), xytext=(0, 3), ha="left", color=INK, **place)
    axes.annotate("chance", (0.01, first.chance), xytext=(0, 3), ha="left", color="#5b616b", **place)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(as_percent)
    axes.set_xlabel("samples of each run (logarithmic)")
    axes.set_ylabel("Jaccard overlap of the two masks")
    axes.legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    plain_axes(axes)
    needed = first.enough(enough)
    if needed is None:
        last = first.points[-1]
        title = f"{last.num_samples} samples are not enough: two runs share {percent(last.jaccard)} of their channels"
    else:
        title = f"From {needed} samples on, two runs share at least {percent(enough)} of their channels"
    seed = "" if first.seed is None else f"seed {first.seed}"
    how = "" if first.measured else "predicted from the standard errors of one run"
    return finish(figure, title, [how, seed, note])
