"""What several masks share, as a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_peft.analysis.disentanglement import Disentanglement
from act_peft.analysis.tables import percent
from act_peft.plots.style import GRADIENT, GREY, INK, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 24  # characters of a name


def draw_overlaps(masks: Disentanglement, *, title: str | None = None, note: str = "") -> Figure:
    """Draw the Jaccard overlap of every pair of masks, and the share of each mask that no other has.

    Args:
        masks: from `measure_disentanglement`, or the `masks` of an agreement or a stability.
        title: the finding; by default that of `masks`.
        note: more for the caption, such as the density and the seed.

    Raises:
        ActError: matplotlib is not installed.
    """
    count = len(masks.names)
    figure = new_figure(max(6.0, 0.85 * count + 4.2), max(3.9, 0.62 * count + 2.4))
    left, right = figure.subplots(1, 2, width_ratios=(max(count, 3), 2.2), sharey=True)
    image = left.imshow(masks.jaccard, cmap=GRADIENT, vmin=0, vmax=1, aspect="auto")
    for row in range(count):
        for column in range(count):
            value = masks.jaccard[row][column]
            text = f"{value:.2f}" if row == column else f"{value:.2f}\n({masks.chance[row][column]:.2f})"
            colour = "white" if value < 0.55 else "black"
            left.annotate(text, (column, row), ha="center", va="center", fontsize=8, color=colour)
    names = [_short(name) for name in masks.names]
    left.set_xticks(range(count), names, rotation=35, ha="right", rotation_mode="anchor")
    left.set_yticks(range(count), names)
    left.tick_params(length=0, labelcolor=INK, labelsize=9)
    left.set_xlabel("Jaccard overlap (in parentheses: by chance)", color=INK)
    right.barh(range(count), masks.unique, color=GREY, height=0.6)
    right.plot(masks.unique_by_chance, range(count), "D", color=INK, markersize=5, label="by chance")
    for row, value in enumerate(masks.unique):
        right.annotate(
            percent(value), (value, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
    right.set_xlim(0, 1.35)
    right.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    right.tick_params(axis="y", length=0, labelleft=False)
    right.set_xlabel("share of the mask\nthat is its own", color=INK)
    right.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    for axes in (left, right):
        for side in axes.spines.values():
            side.set_visible(False)
    bar = figure.colorbar(image, ax=left, location="left", pad=0.02, fraction=0.05)
    bar.set_label("Jaccard overlap of two masks", color=INK)
    bar.outline.set_edgecolor(GREY)
    found = masks.title if title is None else title
    return finish(figure, f"{found[0].upper()}{found[1:]}", [f"{masks.union:,} channels in at least one mask", note])


def _short(name: str) -> str:
    """The end of a long name, which is where paths differ."""
    return name if len(name) <= _LONGEST else f"...{name[-_LONGEST:]}"
