"""How much of the gap between two models some channels close."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from act_peft.analysis.patched import PatchedRow, Patching
from act_peft.analysis.tables import percent
from act_peft.plots.style import COLOURS, GREY, INK, as_percent, finish, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = {
    "sufficiency": "Donor's activations\nput into the base",
    "necessity": "Base's activations\nput into the donor",
}
_MEANING = {"sufficiency": "share of the loss gap that closes", "necessity": "share of the loss gap that opens"}


def draw_sufficiency(patching: Patching, *, note: str = "") -> Figure:
    """Draw the shares of the loss gap over the density of the masks, selected against random channels.

    Args:
        patching: from `patch_channels`.
        note: more for the caption, such as the data.

    Raises:
        ActError: matplotlib is not installed.
    """
    figure = new_figure(8.6, 4.6)
    for axes, (what, title) in zip(figure.subplots(1, 2, sharey=True), _PANELS.items(), strict=True):
        _draw(axes, patching.rows, what)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("share of the channels (logarithmic)")
        axes.set_ylabel(_MEANING[what])
        plain_axes(axes)
    figure.axes[1].legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.93))
    found = f"{patching.title[0].upper()}{patching.title[1:]}"
    where = {"answer": "activations exchanged where answer tokens are predicted"}.get(
        patching.positions, "activations exchanged at all positions"
    )
    counts = f"{patching.num_samples:,} samples, {patching.num_tokens:,} tokens, seed {patching.seed}"
    losses = f"loss {patching.base_loss:.3f} (base), {patching.donor_loss:.3f} (donor) nats per token"
    return finish(figure, found, [counts, losses, where, "bars: one standard error", note])


def _draw(axes: Axes, rows: tuple[PatchedRow, ...], what: str) -> None:
    styles: dict[str, dict[str, Any]] = {
        "selected": {"color": COLOURS[0], "fmt": "-o", "linewidth": 2.2, "label": "selected channels"},
        "random": {"color": GREY, "fmt": "--s", "markerfacecolor": "white", "label": "random, as many a module"},
    }
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for kind, style in styles.items():
        found: dict[float, list[PatchedRow]] = {}
        for row in rows:
            if row.channels == kind and getattr(row, what) is not None and row.num_channels:
                found.setdefault(row.density, []).append(row)
        if not found:
            continue
        densities = sorted(found)
        means = [sum(getattr(r, what) for r in found[d]) / len(found[d]) for d in densities]
        # Random draws share their samples, so their mean is no surer than one of them.
        errors = [sum(getattr(r, f"{what}_error") or 0.0 for r in found[d]) / len(found[d]) for d in densities]
        axes.errorbar(densities, means, yerr=errors, capsize=3, markersize=6, **style)
    axes.set_xscale("log")
    densities = sorted({row.density for row in rows if row.num_channels})
    axes.set_xticks(densities, [percent(density) for density in densities], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(as_percent)
