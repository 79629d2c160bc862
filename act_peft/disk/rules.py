"""The undocumented names of transformers that `disk` needs: the rules by which a model class loads its keys.

A second door beside `act_peft/doors.py`, because `disk` knows nothing of PEFT. `tests/test_doors.py` checks both.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_model_conversion_mapping  # the rules of a model and all its parts
from transformers.core_model_loading import (
    WeightConverter,  # a rule that makes parameters of several tensors, or of parts of one
    WeightRenaming,  # a rule that renames
    dot_natural_key,  # the order in which keys are renamed: some rules depend on what they saw before
    rename_source_key,  # all rules applied to one key
)

__all__ = [
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
]
