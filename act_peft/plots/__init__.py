"""Figures: one function a figure, which returns a matplotlib `Figure`. They need matplotlib (optional).

Every title says what was found, the axes have units, the caption says from how much data. Colours are distinguishable
for colour-blind readers, and lines and markers differ too, so that figures can be read in black and white.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from act_peft.plots.accuracies import draw_accuracies
    from act_peft.plots.composition import draw_composition
    from act_peft.plots.concentration import draw_concentration
    from act_peft.plots.demo import draw_demo
    from act_peft.plots.distribution import draw_distribution
    from act_peft.plots.files import alt_text, check_figure_file, check_matplotlib, save_figure
    from act_peft.plots.overlaps import draw_overlaps
    from act_peft.plots.samples import draw_sample_curve
    from act_peft.plots.scales import draw_scales
    from act_peft.plots.sufficiency import draw_sufficiency
    from act_peft.plots.sweep import draw_sweep

_PLACES = {
    "alt_text": "files",
    "check_figure_file": "files",
    "check_matplotlib": "files",
    "draw_accuracies": "accuracies",
    "draw_composition": "composition",
    "draw_concentration": "concentration",
    "draw_demo": "demo",
    "draw_distribution": "distribution",
    "draw_overlaps": "overlaps",
    "draw_sample_curve": "samples",
    "draw_scales": "scales",
    "draw_sufficiency": "sufficiency",
    "draw_sweep": "sweep",
    "save_figure": "files",
}
__all__ = [
    "alt_text",
    "check_figure_file",
    "check_matplotlib",
    "draw_accuracies",
    "draw_composition",
    "draw_concentration",
    "draw_demo",
    "draw_distribution",
    "draw_overlaps",
    "draw_sample_curve",
    "draw_scales",
    "draw_sufficiency",
    "draw_sweep",
    "save_figure",
]


def __getattr__(name: str) -> object:
    """A public name, from the file that its first use imports."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
