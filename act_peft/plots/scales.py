"""Histogram of learned scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from act_peft.analysis.tables import percent
from act_peft.errors import ActValueError
from act_peft.plots.style import COLOURS, INK, finish, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 40


def draw_scales(scales: Mapping[str, torch.Tensor], *, note: str = "") -> Figure:
    """Draw how often a learned scale has which value.

    Args:
        scales: module -> learned scales of its channels, `[K]`.
        note: more for the caption, such as the seed.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: there are no scales.
    """
    if not sum(values.numel() for values in scales.values()):
        raise ActValueError("scales: got none, expected at least one (train with trainable='scales' or 'both')")
    values = torch.cat([v.detach().flatten().float().cpu() for v in scales.values()])
    zero = int((values == 0).sum())
    moved = values[values != 0]
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 1.0)
    counts = torch.histc(moved, bins=_BINS, min=low, max=high) if moved.numel() else torch.zeros(_BINS)
    width = (high - low) / _BINS
    figure = new_figure(6.8, 4.4)
    axes = figure.subplots()
    axes.bar(
        [low + (n + 0.5) * width for n in range(_BINS)],
        counts.tolist(),
        width=0.92 * width,
        color=COLOURS[0],
        label="other scales",
    )
    axes.bar(0, zero, width=0.92 * width, color="white", edgecolor=INK, hatch="////", label="exactly 0: can be pruned")
    axes.annotate(f"{zero:,}", (0, zero), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xlabel("learned scale (0: the base's row, 1: the donor's row)")
    axes.set_ylabel("channels")
    axes.legend(fontsize=9, frameon=False)
    plain_axes(axes, grid="y")
    kept = f"; the median of the others is {float(moved.median()):.2f}" if moved.numel() else ""
    title = f"{percent(zero / values.numel())} of {values.numel():,} learned scales are 0{kept}"
    return finish(figure, title, [f"{len(scales)} modules", note])
