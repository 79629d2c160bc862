"""Where the channels of a mask lie: layers by kinds of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from act_peft.analysis.composition import Composition
from act_peft.analysis.tables import percent
from act_peft.plots.style import FAINT, GRADIENT, GREY, INK, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 14  # layers up to which the numbers stand in the cells


def draw_composition(composition: Composition, *, note: str = "") -> Figure:
    """Draw the share of the channels that a mask selects, for every layer and kind of module.

    Args:
        composition: from `measure_composition`.
        note: more for the caption, such as where the mask comes from.

    Raises:
        ActError: matplotlib is not installed.
    """
    layers, kinds = list(composition.layers), list(dict.fromkeys(kind for _, kind in composition.cells))
    table = torch.full((len(layers), len(kinds)), float("nan"), dtype=torch.float64)
    for (layer, kind), part in composition.cells.items():
        table[layers.index(layer), kinds.index(kind)] = part.density
    figure = new_figure(max(5.5, 0.72 * len(kinds) + 3), min(max(4.2, 0.26 * len(layers) + 2.8), 14))
    axes = figure.subplots()
    axes.set_facecolor("white")
    highest = float(table.nan_to_num(0).max()) or 1.0
    image = axes.imshow(table.numpy(), cmap=GRADIENT, vmin=0, vmax=highest, aspect="auto")
    every = max(len(layers) // 30, 1)
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    shares = [composition.kinds[kind].selected / max(composition.whole.selected, 1) for kind in kinds]
    axes.set_xticks(
        range(len(kinds)),
        [f"{kind}\n{percent(share)} of mask" for kind, share in zip(kinds, shares, strict=True)],
        rotation=35 if len(kinds) > 3 else 0,
        ha="right" if len(kinds) > 3 else "center",
        rotation_mode="anchor",
    )
    axes.set_xticks([n - 0.5 for n in range(1, len(kinds))], minor=True)
    axes.set_yticks([n - 0.5 for n in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0, labelcolor=INK, labelsize=8.5)
    for side in axes.spines.values():
        side.set_visible(False)
    for row, column in torch.isnan(table).nonzero().tolist():
        axes.plot(column, row, "x", color=FAINT, markersize=5)
    if len(layers) <= _FEW:
        for (layer, kind), part in composition.cells.items():
            colour = "white" if part.density < 0.55 * highest else "black"
            place = (kinds.index(kind), layers.index(layer))
            axes.annotate(percent(part.density), place, ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.02, format=lambda value, _: percent(value))
    bar.set_label("share selected", color=INK)
    bar.outline.set_edgecolor(GREY)
    axes.set_xlabel("kind of module, with its part of the mask", color=INK)
    axes.set_ylabel("layer", color=INK)
    whole = composition.whole
    counts = f"{whole.selected:,} of {whole.channels:,} channels selected ({percent(whole.density)})"
    warning = "" if composition.warning is None else f"warning: {composition.warning}"
    title = f"{composition.title[0].upper()}{composition.title[1:]}"
    return finish(figure, title, [counts, warning, note])
