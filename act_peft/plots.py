"""Figures: distribution of scores, accuracies of models, results of a sweep. They need matplotlib (optional)."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from act_peft.channels.names import last_part
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Scope
from act_peft.checks import finite_number, member_of
from act_peft.disk.atomic import write_file
from act_peft.errors import ActError, ActValueError
from act_peft.sweeps.methods import Method
from act_peft.sweeps.result import SweepResult
from act_peft.sweeps.rows import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
FEW_GROUPS = 16  # as many as the legend has room for and colours can distinguish
POINTS = 400  # points of a curve; more would not be visible
_GREY = "#8a8f98"
_INK = "#23272e"
_FAINT = "#e3e6ea"
_OVERALL = "all modules"
# Distinguishable for colour-blind readers (Paul Tol's "muted").
_COLOURS = (
    "#cc6677",
    "#332288",
    "#ddcc77",
    "#117733",
    "#88ccee",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
    "#661100",
)
_BARS = ("#b9bec7", "#6c7380", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#aa4499", "#882255")


class Grouping(Enum):
    """How modules are grouped into curves."""

    KIND = "kind"
    LAYER = "layer"


def check_matplotlib() -> None:
    """Check that figures can be drawn; to be called before long work that ends with one.

    Raises:
        ActError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ActError('figures: matplotlib is not installed, expected it (pip install "act-peft[demo]")')


def plot_scores(
    scores: ChannelScores,
    path: str | os.PathLike[str],
    *,
    density: float | None = None,
    scope: str | Scope = Scope.GLOBAL,
    group_by: str | Grouping = Grouping.KIND,
) -> None:
    """Draw the complementary cumulative distribution of the scores, overall and by group, both axes logarithmic.

    For a score x the curve shows the share of the group's channels whose score is at least x.

    Args:
        scores: from `localize`.
        path: the PNG to write, whole or not at all.
        density: share of the channels whose cut is marked, above 0 and at most 1.
        scope: as in `ChannelScores.top`. `"global"`: one cut, at the same score for all modules. `"module"`: the same
            share of every module, so the cut of a group lies about where its curve crosses the share.
        group_by: `"kind"` pools the modules of one name over the layers, `"layer"` those of one layer.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: `density`, `scope` or `group_by` is none of these, or the folder does not exist.
    """
    figure = _figure(7.2, 4.8)
    _draw_scores(figure.subplots(), scores, density, member_of(Scope, scope, "scope"), group_by)
    _save(figure, path)


def plot_accuracies(accuracies: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw accuracies as groups of bars, one group a skill and one bar a model.

    Args:
        accuracies: model -> skill -> share from 0 to 1; the same skills for every model.
        path: the PNG to write, whole or not at all.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: the models have different skills or none, or the folder does not exist.
    """
    figure = _figure(8, 4.8)
    _draw_accuracies(figure.subplots(), accuracies)
    _save(figure, path)


def plot_demo(
    scores: ChannelScores,
    accuracies: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    density: float,
    scope: str | Scope = Scope.GLOBAL,
) -> None:
    """Draw `plot_scores` and `plot_accuracies` side by side.

    Args:
        scores: as in `plot_scores`.
        accuracies: as in `plot_accuracies`.
        path: the PNG to write, whole or not at all.
        density: as in `plot_scores`.
        scope: as in `plot_scores`.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: as in `plot_scores` and `plot_accuracies`.
    """
    figure = _figure(14, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_scores(left, scores, density, member_of(Scope, scope, "scope"), Grouping.KIND)
    _draw_accuracies(right, accuracies)
    _save(figure, path)


def plot_sweep(result: SweepResult, path: str | os.PathLike[str]) -> None:
    """Draw every setting of a sweep: accuracy on the skill to keep (x axis) and on the ability (y axis).

    With `max_keep_loss` losses are drawn in place of accuracies: the rise on what is kept, and the loss on the
    ability, both so that better is further up and to the right; what is far beyond the limit is left out. One line for
    each density of scored channels, along the transfer scales, and points for other methods; base, donor, Pareto front
    and recommendation are marked. With several skills to keep, their mean accuracy or the worst rise is drawn.

    Args:
        result: from `sweep`.
        path: the PNG to write, whole or not at all.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: the folder does not exist.
    """
    figure = _figure(7.2, 5.2)
    _draw_sweep(figure.subplots(), result)
    _save(figure, path)


def group_scores(scores: ChannelScores, group_by: str | Grouping = Grouping.KIND) -> dict[str, torch.Tensor]:
    """Pool the scores of related modules.

    Args:
        scores: from `localize`.
        group_by: `"kind"`: the last part of a module's name (`q_proj`); `"layer"`: its first number, and the kind for
            modules outside the layers.

    Returns:
        Group -> scores of its channels, float64 `[C]`, in the model's order.

    Raises:
        ActValueError: `group_by` is none of these.
    """
    name_of = _GROUP_NAMES[member_of(Grouping, group_by, "group_by")]
    groups: dict[str, list[torch.Tensor]] = {}
    for name, values in scores.items():
        groups.setdefault(name_of(name), []).append(values)
    return {name: torch.cat(parts) for name, parts in groups.items()}


def _layer_of(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    return f"layer {number[1]}" if number else last_part(name)


_GROUP_NAMES = {Grouping.KIND: last_part, Grouping.LAYER: _layer_of}


def _figure(width: float, height: float) -> Figure:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)
    axes.tick_params(which="both", color=_GREY, labelcolor=_INK, labelsize=9)
    axes.set_axisbelow(True)


def _draw_scores(
    axes: Axes, scores: ChannelScores, density: float | None, scope: Scope, group_by: str | Grouping
) -> None:
    if density is not None:
        density = finite_number(density, "density", above=0, most=1)
    groups = group_scores(scores, group_by)
    everything = torch.cat(list(groups.values()))  # [C] of all modules
    for (name, values), look in zip(groups.items(), _looks(len(groups)), strict=True):
        axes.plot(*_curve(values), **look, linewidth=1.3, label=f"{name} ({values.numel():,})")
        if density is not None and scope is Scope.MODULE:
            axes.plot(_cut(values, density), density, "o", color=look["color"], markersize=4.5)
    axes.plot(*_curve(everything), color=_INK, linewidth=2.6, label=f"{_OVERALL} ({everything.numel():,})")
    positive = everything[everything > 0]
    axes.set_xscale("log" if positive.numel() else "linear")
    axes.set_yscale("log")
    if positive.numel():
        # The lowest percent of the scores may lie many decades below the rest.
        lowest = positive.sort().values[positive.numel() // 100]
        axes.set_xlim(0.8 * float(lowest), 1.3 * float(positive.max()))
    axes.set_ylim(0.7 / everything.numel(), 1.5)
    if density is not None:
        _mark_cut(axes, density, scope, _cut(everything, density))
    axes.set_xlabel("score: mean |activation difference|", color=_INK)
    axes.set_ylabel("share of channels with at least this score", color=_INK)
    axes.grid(which="major", color=_FAINT, linewidth=0.8)
    place: dict[str, Any] = {"loc": "lower left"}
    if len(groups) > FEW_GROUPS:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "ncols": -(-len(groups) // 30)}
    legend = axes.legend(fontsize=8, frameon=False, title="module (channels)", title_fontsize=8, **place)
    legend.set_alignment("left")
    _style(axes, "Where base and donor answer differently")


def _looks(count: int) -> list[dict[str, Any]]:
    """Colour and line of each group: distinct ones for a few groups, a gradient in the model's order for many."""
    if count <= FEW_GROUPS:
        styles = [style for style in ("-", "--") for _ in _COLOURS]
        return [{"color": colour, "linestyle": style} for colour, style in zip(2 * _COLOURS, styles, strict=True)][
            :count
        ]
    from matplotlib import colormaps

    gradient = colormaps["viridis"].resampled(count)
    return [{"color": gradient(number)} for number in range(count)]


def _mark_cut(axes: Axes, density: float, scope: Scope, lowest: float) -> None:
    dashes: Any = {"color": _INK, "linewidth": 1, "linestyle": (0, (4, 3))}
    text: Any = {"textcoords": "offset points", "fontsize": 9, "color": _INK, "va": "top"}
    if scope is Scope.MODULE:
        axes.axhline(density, **dashes)
        label = f"selected: top {100 * density:.3g}% of every module"
        axes.annotate(label, (0.015, density), xycoords=axes.get_yaxis_transform(), xytext=(0, -4), **text)
    else:
        axes.axvline(lowest, **dashes)
        axes.plot(lowest, density, "o", color=_INK, markersize=6)
        label = f"selected: top {100 * density:.3g}%"
        axes.annotate(label, (lowest, 0.985), xycoords=axes.get_xaxis_transform(), xytext=(-5, 0), ha="right", **text)


def _curve(values: torch.Tensor) -> tuple[list[float], list[float]]:
    """Scores in rising order, without zeros (the axis is logarithmic), and the share of channels at or above each."""
    ordered = values.sort().values
    share = 1 - torch.arange(ordered.numel(), dtype=torch.float64) / ordered.numel()
    ordered, share = ordered[ordered > 0], share[ordered > 0]
    if ordered.numel() > POINTS:  # evenly spaced in log(share), so that the tail keeps its points
        wanted = torch.logspace(0, float(share[-1].log10()), POINTS, dtype=torch.float64)
        chosen = torch.searchsorted(-share, -wanted).clamp(max=ordered.numel() - 1).unique()
        ordered, share = ordered[chosen], share[chosen]
    return ordered.tolist(), share.tolist()


def _cut(values: torch.Tensor, density: float) -> float:
    """The lowest selected score."""
    selected = max(round(density * values.numel()), 1)
    return float(values.sort(descending=True).values[selected - 1])


def _draw_accuracies(axes: Axes, accuracies: Mapping[str, Mapping[str, float]]) -> None:
    skills = list(next(iter(accuracies.values()), ()))
    different = [name for name, row in accuracies.items() if list(row) != skills]
    if not skills or different:
        where = different[0] if different else "accuracies"
        raise ActValueError(
            f"{where}: got {list(accuracies.get(where, ()))}, expected the same skills for every model"
        )
    width = 0.84 / len(accuracies)
    for number, (name, row) in enumerate(accuracies.items()):
        control = name.startswith("control")
        offset = (number - (len(accuracies) - 1) / 2) * width
        bars = axes.bar(
            [index + offset for index in range(len(skills))],
            [row[skill] for skill in skills],
            width=0.92 * width,
            color=_BARS[number % len(_BARS)],
            alpha=0.75 if control else 1,
            hatch="////" if control else None,
            edgecolor="white" if control else "none",
            linewidth=0,
            label=name,
        )
        axes.bar_label(
            bars, labels=[f"{100 * row[skill]:.0f}" for skill in skills], padding=2, fontsize=8.5, color=_INK
        )
    axes.set_xticks(range(len(skills)), skills, fontsize=10)
    axes.set_xlim(-0.55, len(skills) - 0.45)
    axes.set_ylim(0, 1.06)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%" if value <= 1 else "")
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_ylabel("test problems answered right", color=_INK)
    axes.legend(fontsize=9, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    _style(axes, "What the models can do")
    axes.tick_params(axis="x", length=0, labelsize=10)


def _draw_sweep(axes: Axes, result: SweepResult) -> None:
    from matplotlib import colormaps

    by_loss = result.max_keep_loss is not None

    def draw(rows: Sequence[Measurement], *style: str, **look: Any) -> None:
        kept = [row.keep_rise(result.base) if by_loss else row.keep_accuracy for row in rows]
        axes.plot(kept, [row.ability.loss if by_loss else row.ability.accuracy for row in rows], *style, **look)

    densities = list(result.masks)
    gradient = colormaps["viridis"].resampled(len(densities) + 1)  # the last colour is too light
    draw(result.front, "-", color=_FAINT, linewidth=7, solid_capstyle="round", label="Pareto front", zorder=1)
    for number, density in enumerate(densities):
        rows = [row for row in result.rows if row.method is Method.CHANNELS and row.density == density]
        look: Any = {"color": gradient(number), "markersize": 4.5, "linewidth": 1.2}
        draw([result.base, *rows], "-o", label=f"density {density:.3g}", **look)
    for number, method in enumerate(dict.fromkeys(row.method for row in result.rows)):
        if method is not Method.CHANNELS:
            rows = [row for row in result.rows if row.method is method]
            draw(rows, "^", color=_COLOURS[number % len(_COLOURS)], markersize=5.5, label=method.value)
    draw([result.base], "s", color=_INK, markersize=8, label="base")
    if result.donor is not None:
        draw([result.donor], "D", color=_INK, markersize=7, label="donor")
    best = result.recommended
    if best is not None:
        words = best.title if best.method is Method.CHANNELS else best.title.replace(", ", "\n")
        name = f"recommended: {words}"
        draw([best], "o", color=_COLOURS[0], markersize=13, markerfacecolor="none", markeredgewidth=2, label=name)
    # With several skills, the limit of the accuracy is one of each and not of their mean.
    limit = result.max_keep_loss
    if result.max_drop is not None and len(result.base.keep) == 1:
        limit = result.base.keep_accuracy - result.max_drop
    if limit is not None:
        _draw_limit(axes, limit)
    axes.grid(color=_FAINT, linewidth=0.8)
    names = ", ".join(result.base.keep)
    if by_loss:
        _show_losses(axes, result)
        axes.set_xlabel(f"rise of the loss per token: {names}", color=_INK)
        axes.set_ylabel("loss on the ability", color=_INK)
    else:
        mean = "mean " if len(result.base.keep) > 1 else ""
        axes.set_xlabel(f"{mean}token accuracy on what is kept: {names}", color=_INK)
        axes.set_ylabel("token accuracy on the ability", color=_INK)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _style(axes, "What each setting gives and costs")


def _draw_limit(axes: Axes, limit: float) -> None:
    axes.axvline(limit, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    look: Any = {"xytext": (-4, 0), "textcoords": "offset points", "fontsize": 9, "color": _INK, "ha": "right"}
    axes.annotate("most that may be lost", (limit, 0.015), xycoords=axes.get_xaxis_transform(), **look)


def _show_losses(axes: Axes, result: SweepResult) -> None:
    """Turn the axes, so that better is up and to the right, and leave out what is far beyond the limit."""
    near = [row for row in result.front if row.keep_rise(result.base) <= 5 * (result.max_keep_loss or 0)]
    rises = [row.keep_rise(result.base) for row in near]
    losses = [row.ability.loss for row in near]
    left, right = min(rises), max(*rises, 4 * (result.max_keep_loss or 0), 1e-3)
    low, high = min(losses), max(*losses, result.base.ability.loss)
    margin = 0.08 * (high - low) or 0.1
    axes.set_xlim(right + 0.05 * (right - left), left - 0.05 * (right - left))
    axes.set_ylim(high + margin, low - margin)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    if not path.parent.is_dir():
        raise ActValueError(f"{path}: folder {path.parent} does not exist, expected an existing one (create it first)")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    write_file(path, picture.getvalue())
