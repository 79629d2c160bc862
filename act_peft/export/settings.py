"""What a user chooses for an export."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from act_peft.checks import member_of, whole_number
from act_peft.errors import ActValueError
from act_peft.export.targets import Target


class Biases(Enum):
    """How to treat deltas of biases and norms, for which a LoRA adapter has no factors.

    ERROR: refuse them. LORA_BIAS: PEFT's `lora_bias`; exact; only for linear layers, in an adapter without embeddings.
    MODULES_TO_SAVE: save these modules as a whole, base weights included. Deltas that are all zero are ignored.
    """

    ERROR = "error"
    LORA_BIAS = "lora_bias"
    MODULES_TO_SAVE = "modules_to_save"


@dataclass(frozen=True)
class ExportSettings:
    """Arguments of `export_lora`, checked."""

    target: Target
    max_rank: int | None
    uniform_rank: bool
    biases: Biases


def checked_settings(
    target: str | Target, max_rank: int | None, uniform_rank: bool, biases: str | Biases
) -> ExportSettings:
    """The settings of an export.

    Raises:
        ActValueError, ActTypeError: settings that are none, or that contradict each other.
    """
    chosen, treated = member_of(Target, target, "target"), member_of(Biases, biases, "biases")
    if max_rank is not None:
        max_rank = whole_number(max_rank, "max_rank", least=1)
    if chosen.engine is not None and treated is not Biases.ERROR:
        raise ActValueError(
            f"biases: got {treated.value!r} with target={chosen.value!r}, expected 'error', as {chosen.engine.name} "
            "loads neither biases nor whole modules (merge the adapter and serve the merged model)"
        )
    return ExportSettings(chosen, max_rank, uniform_rank, treated)
