"""How much of the scores the best channels hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from act_peft.analysis.concentration import comparable_scores
from act_peft.analysis.tables import percent
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.channels.selection import Scope
from act_peft.checks import finite_number, member_of
from act_peft.plots.style import COLOURS, GREY, INK, as_percent, data_of, finish, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STEPS = 200


def draw_concentration(
    scores: ChannelScores, *, density: float = 0.05, scope: str | Scope = Scope.GLOBAL, note: str = ""
) -> Figure:
    """Draw the share of the sum of scores that the best p% of the channels hold, for every p.

    Args:
        scores: from `localize`, or the gains of a fit.
        density: the share of the channels that is marked, above 0 and at most 1.
        scope: `"global"`: the best of all channels together; `"module"`: the same share of every module.
        note: more for the caption, such as the seed.

    Raises:
        ActError: matplotlib is not installed.
        ActTypeError, ActValueError: `density` or `scope` is none of these.
    """
    figure = new_figure(6.4, 4.8)
    title = paint_concentration(figure.subplots(), scores, density, scope)
    return finish(figure, title, [f"{sum(scores.num_comparable.values()):,} channels", data_of(scores), note])


def paint_concentration(axes: Axes, scores: ChannelScores, density: float, scope: str | Scope) -> str:
    """Draw into existing axes; returns the finding."""
    density = finite_number(density, "density", above=0, most=1)
    scope = member_of(Scope, scope, "scope")
    values = [v.clamp_min(0) for v in comparable_scores(scores).values()]
    groups = [torch.cat(values)] if scope is Scope.GLOBAL else values
    held = [torch.cat([v.new_zeros(1), v.sort(descending=True).values.cumsum(0)]) for v in groups]  # of k = 0, 1, ...
    total = sum(float(sums[-1]) for sums in held)

    def share(of: float) -> float:
        found = sum(float(sums[round(of * (sums.numel() - 1))]) for sums in held)
        return found / total if total else 0.0

    what = "gain" if scores.kind is ScoreKind.GAIN else "sum of scores"
    steps = [step / _STEPS for step in range(_STEPS + 1)]
    axes.plot(steps, [share(step) for step in steps], color=COLOURS[0], linewidth=2.5)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("if all channels were alike", (0.62, 0.6), color="#5b616b", fontsize=8.5, va="top")
    axes.plot([density, density, 0], [0, share(density), share(density)], color=INK, linewidth=1, linestyle=":")
    axes.plot(density, share(density), "o", color=INK, markersize=7)
    right = density > 0.5
    axes.annotate(
        f"{percent(density)} of the channels:\n{percent(share(density))} of the {what}",
        (density, share(density)),
        xytext=(-10 if right else 10, -8),
        textcoords="offset points",
        fontsize=9.5,
        color=INK,
        va="top",
        ha="right" if right else "left",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("best channels of every module" if scope is Scope.MODULE else "best channels of the model")
    axes.set_ylabel(f"share of the {what}")
    axes.xaxis.set_major_formatter(as_percent)
    axes.yaxis.set_major_formatter(as_percent)
    plain_axes(axes)
    where = "of every module " if scope is Scope.MODULE else ""
    return f"The best {percent(density)} of the channels {where}hold {percent(share(density))} of the {what}"
