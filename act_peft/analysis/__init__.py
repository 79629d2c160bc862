"""Numbers about scores and masks: where an ability sits, how sure that is, and whether it suffices.

The paper (arXiv 2601.09398) names concentration, sufficiency, stability and disentanglement; only the first is defined
there. The other definitions are ours, each in the docstring of its function. All but `patch_channels` need
no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from act_peft.analysis.agreement import Agreement, measure_agreement
    from act_peft.analysis.composition import Composition, measure_composition
    from act_peft.analysis.concentration import Concentration, measure_concentration
    from act_peft.analysis.difference import CheckpointDifference, compare_checkpoints
    from act_peft.analysis.disentanglement import Disentanglement, measure_disentanglement
    from act_peft.analysis.overlap import Overlap, compare_masks
    from act_peft.analysis.patched import Patching
    from act_peft.analysis.patching import patch_channels
    from act_peft.analysis.stability import (
        SampleCurve,
        Stability,
        measure_sample_curve,
        measure_stability,
        predict_overlap,
    )

_FILES = {
    "agreement": ("Agreement", "measure_agreement"),
    "composition": ("Composition", "measure_composition"),
    "concentration": ("Concentration", "measure_concentration"),
    "difference": ("CheckpointDifference", "compare_checkpoints"),
    "disentanglement": ("Disentanglement", "measure_disentanglement"),
    "overlap": ("Overlap", "compare_masks"),
    "patched": ("Patching",),
    "patching": ("patch_channels",),
    "stability": ("SampleCurve", "Stability", "measure_sample_curve", "measure_stability", "predict_overlap"),
}
_PLACES = {name: file for file, names in _FILES.items() for name in names}
__all__ = [
    "Agreement",
    "CheckpointDifference",
    "Composition",
    "Concentration",
    "Disentanglement",
    "Overlap",
    "Patching",
    "SampleCurve",
    "Stability",
    "compare_checkpoints",
    "compare_masks",
    "measure_agreement",
    "measure_composition",
    "measure_concentration",
    "measure_disentanglement",
    "measure_sample_curve",
    "measure_stability",
    "patch_channels",
    "predict_overlap",
]


def __getattr__(name: str) -> object:
    """A public name, from the file that its first use imports."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
