"""The look that all figures share: colours, title, caption, axes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.plots.files import check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#23272e"
GREY = "#8a8f98"
FAINT = "#e3e6ea"
# Paul Tol's "bright", in an order in which neighbours also differ in brightness.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GRADIENT = "cividis"  # its brightness rises evenly
CHARACTERS_PER_INCH = 8.8  # of a title
QUANTITIES = {
    ScoreKind.ACTIVATION: "score: mean |difference of the outputs|, in units of the activations",
    ScoreKind.WEIGHT: "score: norm of the difference of the weights",
    ScoreKind.ATTRIBUTION: "score: decrease of the loss, in nats per token",
    ScoreKind.GAIN: "gain: decrease of the fit's objective",
    ScoreKind.CONTRAST: "score: difference on the ability / difference on the data to keep",
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ActError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=160)


def finish(figure: Figure, title: str, caption: Iterable[str]) -> Figure:
    """Add the finding above the axes, and below them what the numbers are made of.

    Args:
        figure: the figure.
        title: one sentence.
        caption: parts of it; empty ones are left out.
    """
    figure.suptitle(wrapped(figure, title), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    text = "; ".join(part for part in caption if part)
    if text:
        figure.supxlabel(
            wrapped(figure, text, CHARACTERS_PER_INCH * 1.6), x=0.01, ha="left", fontsize=8, color="#5b616b"
        )
    return figure


def wrapped(figure: Any, text: str, characters_per_inch: float = CHARACTERS_PER_INCH) -> str:
    """A text in lines as long as the figure is wide."""
    return "\n".join(textwrap.wrap(text, max(int(figure.get_figwidth() * characters_per_inch), 20)))


def plain_axes(axes: Axes, *, grid: str | None = "both") -> None:
    """Thin grey lines, no frame."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, which="major", color=FAINT, linewidth=0.8)  # type: ignore[arg-type]


def look(number: int) -> dict[str, Any]:
    """Colour and dashes of the curve with a number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def as_percent(value: float, _: object = None) -> str:
    """A tick of an axis of shares."""
    return f"{100 * value:.3g}%"


def data_of(scores: ChannelScores) -> str:
    """From how much data scores are."""
    if not scores.num_tokens:
        return ""
    samples = "" if scores.num_samples is None else f"{scores.num_samples:,} samples, "
    return f"{samples}{scores.num_tokens:,} tokens"
