"""Registers ACT with PEFT: a member of its enum of methods, and entries in its tables.

PEFT's own `register_peft_method` refuses a name that its enum lacks, and offers no way to add one.
"""

from __future__ import annotations

from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from act_peft.doors import PEFT_TYPE_TO_PREFIX_MAPPING
from act_peft.errors import ActError
from act_peft.tuner.saving import save_whole_folders_

NAME = "ACT"


def register(config_class: type, model_class: Any) -> None:
    """Register the method with PEFT. A second call is harmless, also after a reload of the library.

    Args:
        config_class: `ActConfig`.
        model_class: `ActModel`.

    Raises:
        ActError: PEFT has a method of this name of its own.
    """
    if NAME in PeftType.__members__:
        known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(NAME))
        if known is None or known.__module__ != config_class.__module__:
            raise ActError(
                f"PEFT has its own method named {NAME} ({known}), so act_peft cannot register its own "
                "(use an older PEFT, or a newer act_peft)"
            )
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(PeftType(NAME), None)
    else:
        _extend_enum()
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)
    save_whole_folders_()


def _extend_enum() -> None:
    """Add the member with the same steps as `enum` itself. An assignment alone would not make it a member."""
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.12 and newer
        PeftType._hashable_values_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
