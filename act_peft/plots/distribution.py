"""The distribution of scores, with the cut of a selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from act_peft.analysis.concentration import (
    comparable_scores,
    complementary_distribution,
    group_scores,
    share_of_top,
)
from act_peft.analysis.groups import Grouping
from act_peft.analysis.tables import percent
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Scope
from act_peft.checks import finite_number, member_of
from act_peft.plots.style import GREY, INK, QUANTITIES, as_percent, data_of, finish, look, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 4  # groups that are told apart; the others stay grey


def draw_distribution(
    scores: ChannelScores,
    *,
    density: float = 0.05,
    scope: str | Scope = Scope.GLOBAL,
    group_by: str | Grouping = Grouping.KIND,
    note: str = "",
) -> Figure:
    """Draw which share of the channels has at least a score (complementary distribution), both axes logarithmic.

    All channels are one thick line. The groups whose tails reach farthest, and the one whose tail ends first, are
    named; the others are grey.

    Args:
        scores: from `localize`.
        density: share of the channels whose cut is marked, above 0 and at most 1.
        scope: as in `ChannelScores.top`. `"global"`: one cut, at the same score for all modules. `"module"`: the same
            share of every module, so the cut of a group lies about where its curve crosses the share.
        group_by: `"kind"` pools the modules of one name over the layers, `"layer"` those of one layer.
        note: more for the caption, such as the seed.

    Raises:
        ActError: matplotlib is not installed.
        ActTypeError, ActValueError: `density`, `scope` or `group_by` is none of these.
    """
    density = finite_number(density, "density", above=0, most=1)
    scope, grouping = member_of(Scope, scope, "scope"), member_of(Grouping, group_by, "group_by")
    comparable = comparable_scores(scores)
    groups = group_scores(comparable, grouping)
    everything = torch.cat(list(comparable.values()))
    figure = new_figure(7.6, 5.0)
    axes = figure.subplots()
    _draw_groups(axes, groups, density)
    axes.plot(*complementary_distribution(everything), color=INK, linewidth=3, label=f"all ({everything.numel():,})")
    positive = everything[everything > 0]
    axes.set_xscale("log" if positive.numel() else "linear")
    axes.set_yscale("log")
    axes.set_ylim(0.7 / everything.numel(), 1.6)
    if positive.numel():
        low = float(positive.quantile(0.01)) if positive.numel() < 1 << 24 else float(positive.min())
        axes.set_xlim(0.8 * low, 1.6 * float(positive.max()))
    if scope is Scope.GLOBAL:
        cut = _height(everything, density)
        axes.axvspan(cut, axes.get_xlim()[1], color=GREY, alpha=0.18, linewidth=0)
        axes.axvline(cut, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"selected: top {percent(density)}",
            (cut, 0.97),
            xycoords=axes.get_xaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            va="top",
        )
    else:
        axes.axhspan(axes.get_ylim()[0], density, color=GREY, alpha=0.18, linewidth=0)
        axes.axhline(density, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"selected: top {percent(density)} of every module",
            (0.015, density),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, -4),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            va="top",
        )
    axes.set_xlabel(QUANTITIES[scores.kind])
    axes.set_ylabel("share of channels with at least this score")
    axes.yaxis.set_major_formatter(as_percent)
    legend = axes.legend(fontsize=8.5, frameon=False, loc="lower left", title="channels of", title_fontsize=8.5)
    legend.set_alignment("left")
    plain_axes(axes)
    held = share_of_top(list(comparable.values()), density, scope)
    channels = "all channels" if scope is Scope.GLOBAL else "every module's channels"
    title = f"The top {percent(density)} of {channels} hold {percent(held)} of the sum of scores"
    return finish(figure, title, [f"{everything.numel():,} channels", data_of(scores), note])


def _draw_groups(axes: Axes, groups: dict[str, torch.Tensor], density: float) -> None:
    if len(groups) < 2:
        return
    order = sorted(groups, key=lambda name: -_height(groups[name], density))
    named = [*order[: NAMED - 1], order[-1]] if len(order) >= NAMED else order
    others = [name for name in groups if name not in named]
    for name in others:
        axes.plot(*complementary_distribution(groups[name]), color=GREY, alpha=0.7, linewidth=0.9)
    if others:
        axes.plot([], [], color=GREY, linewidth=0.9, label=f"{len(others)} other groups")
    for number, name in enumerate(named):
        values = groups[name]
        axes.plot(
            *complementary_distribution(values), **look(number), linewidth=1.8, label=f"{name} ({values.numel():,})"
        )


def _height(values: torch.Tensor, density: float) -> float:
    """The score that a share of the channels reaches."""
    return float(values.sort(descending=True).values[max(round(density * values.numel()), 1) - 1])
