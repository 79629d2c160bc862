"""What every setting of a sweep gives and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from act_peft.analysis.tables import percent
from act_peft.plots.style import COLOURS, FAINT, GREY, INK, MARKERS, as_percent, finish, look, new_figure, plain_axes
from act_peft.sweeps.methods import Method
from act_peft.sweeps.result import SweepResult
from act_peft.sweeps.rows import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIMES_THE_LIMIT = 5  # rises of the loss beyond this are left out
Point = Callable[[Measurement], tuple[float, float]]


def draw_sweep(result: SweepResult, *, note: str = "") -> Figure:
    """Draw every setting of a sweep: accuracy on the skill to keep (x axis) and on the ability (y axis).

    With `max_keep_loss` losses are drawn in place of accuracies: the rise on what is kept, and the loss on the
    ability, both so that better is further up and to the right; what is far beyond the limit is left out. One line for
    each density of scored channels, along the transfer scales, and points for other methods; base, Pareto front and
    recommendation are marked. The donor is an arrow at the edge if it lies far from the settings. With several skills
    to keep, their mean accuracy or the worst rise is drawn.

    Args:
        result: from `sweep`.
        note: more for the caption, such as the seed.

    Raises:
        ActError: matplotlib is not installed.
    """
    by_loss = result.max_keep_loss is not None
    figure = new_figure(8.2, 5.2)
    axes = figure.subplots()

    def point(row: Measurement) -> tuple[float, float]:
        if by_loss:
            return row.keep_rise(result.base), row.ability.loss
        return row.keep_accuracy, row.ability.accuracy

    _draw_settings(axes, result, point)
    _set_limits(axes, result, point)
    if result.donor is not None:
        _draw_donor(axes, point(result.donor), by_loss=by_loss)
    _draw_limit(axes, result)
    names = ", ".join(result.base.keep)
    if by_loss:
        axes.set_xlabel(f"rise of the loss on what is kept: {names}, in nats per token (less is to the right)")
        axes.set_ylabel("loss on the ability, in nats per token (less is up)")
    else:
        mean = "mean " if len(result.base.keep) > 1 else ""
        axes.set_xlabel(f"{mean}token accuracy on what is kept: {names}")
        axes.set_ylabel("token accuracy on the ability")
        axes.xaxis.set_major_formatter(as_percent)
        axes.yaxis.set_major_formatter(as_percent)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    plain_axes(axes)
    return finish(figure, _finding(result), [f"{len(result.rows)} settings", _tokens(result), note])


def _finding(result: SweepResult) -> str:
    best, base = result.recommended, result.base
    if best is None:
        return f"None of {len(result.rows)} settings is worth taking within the limit"
    if result.max_keep_loss is not None:
        gain = f"Loss on the ability {base.ability.loss:.2f} → {best.ability.loss:.2f}"
        return f"Recommended: {best.title}. {gain}, on what is kept {best.keep_rise(base):+.3f}"
    ability = f"{percent(base.ability.accuracy)} → {percent(best.ability.accuracy)}"
    kept = f"{percent(base.keep_accuracy)} → {percent(best.keep_accuracy)}"
    return f"Recommended: {best.title}. Ability {ability}, kept {kept}"


def _tokens(result: SweepResult) -> str:
    counts = {"ability": result.base.ability.num_tokens} | {n: s.num_tokens for n, s in result.base.keep.items()}
    known = [f"{name} {count:,}" for name, count in counts.items() if count is not None]
    return f"held-out tokens: {', '.join(known)}" if known else ""


def _draw_settings(axes: Axes, result: SweepResult, point: Point) -> None:
    def draw(rows: Sequence[Measurement], **style: Any) -> None:
        if rows:
            axes.plot(*zip(*map(point, rows), strict=True), **style)

    draw(result.front, color=FAINT, linewidth=9, solid_capstyle="round", label="not beaten (Pareto front)", zorder=1)
    for number, density in enumerate(result.masks or sorted({r.density for r in _channels(result)})):
        rows = [row for row in _channels(result) if row.density == density]
        marker = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.4}
        draw([result.base, *rows], label=f"density {percent(density)}", **look(number), **marker)
    others = dict.fromkeys(row.method for row in result.rows if row.method is not Method.CHANNELS)
    for number, method in enumerate(others):
        rows = [row for row in result.rows if row.method is method]
        marker = {"marker": MARKERS[number % len(MARKERS)], "markersize": 6, "linestyle": "none"}
        filled = COLOURS[number % len(COLOURS)] if number < len(MARKERS) else "white"
        draw(rows, color=COLOURS[number % len(COLOURS)], markerfacecolor=filled, label=method.value, **marker)
    draw([result.base], color=INK, marker="s", markersize=9, linestyle="none", label="base", zorder=4)
    best = result.recommended
    if best is not None:
        ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2.2}
        draw([best], color=INK, linestyle="none", label="recommended", zorder=5, **ring)


def _channels(result: SweepResult) -> list[Any]:
    return [row for row in result.rows if row.method is Method.CHANNELS]


def _set_limits(axes: Axes, result: SweepResult, point: Point) -> None:
    """Show the settings near the limit; the donor may lie outside."""
    limit = result.max_keep_loss
    rows: list[Measurement] = [result.base, *result.rows]
    if limit is not None:
        rows = [row for row in rows if row.keep_rise(result.base) <= max(_TIMES_THE_LIMIT * limit, 1e-3)]
    x, y = zip(*map(point, rows), strict=True)
    edge = _limit_of(result)
    x = (*x, edge) if edge is not None else x
    (left, right), (low, high) = (_widened(min(values), max(values)) for values in (x, y))
    if limit is None:
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
    else:  # turned, so that better is up and to the right
        axes.set_xlim(right, left)
        axes.set_ylim(high, low)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = 0.08 * (high - low) or 0.02
    return low - margin, high + margin


def _draw_donor(axes: Axes, place: tuple[float, float], *, by_loss: bool) -> None:
    """The donor's point, or an arrow at the edge that says where it is."""
    limits = (axes.get_xlim(), axes.get_ylim())
    inside = [min(max(value, min(limit)), max(limit)) for value, limit in zip(place, limits, strict=True)]
    if inside == list(place):
        axes.plot(*place, "D", color=INK, markersize=8, label="donor", zorder=4)
        return
    edge = tuple((value - limit[0]) / (limit[1] - limit[0]) for value, limit in zip(inside, limits, strict=True))
    inner = tuple(min(max(share, 0.07), 0.93) for share in edge)
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6}
    where: Any = {"xycoords": "axes fraction", "textcoords": "axes fraction"}
    axes.annotate("", edge, xytext=inner, arrowprops=arrow, **where)  # type: ignore[arg-type]
    shown = ", ".join(f"{value:.3g}" if by_loss else percent(value) for value in place)
    axes.plot([], [], marker="$\\nwarrow$", color=INK, markersize=9, linestyle="none", label=f"donor: {shown}")


def _limit_of(result: SweepResult) -> float | None:
    """Where the limit lies on the x axis. With several skills, the limit of the accuracy is not that of their mean."""
    if result.max_keep_loss is not None:
        return result.max_keep_loss
    if result.max_drop is not None and len(result.base.keep) == 1:
        return result.base.keep_accuracy - result.max_drop
    return None


def _draw_limit(axes: Axes, result: SweepResult) -> None:
    limit = _limit_of(result)
    if limit is None:
        return
    axes.axvline(limit, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        "limit: most that may be lost",
        (limit, 0.015),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4, 0),
        textcoords="offset points",
        fontsize=8.5,
        color=INK,
        ha="right",
        rotation=90,
        va="bottom",
    )
