"""The LoRA twin of a saved ACT adapter: the same change as an ordinary LoRA adapter, in a folder inside.

Programs that never import act_peft (lm-eval, axolotl, text generation interfaces) load this folder.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

from torch import nn

from act_peft.errors import ActValueError, ActWarning
from act_peft.export.lora import export_lora
from act_peft.export.settings import Biases

_MARK = "<!-- act_peft: lora twin -->"


def twin_folder(adapter_name: str) -> str:
    """The twin's folder inside the one that a model's adapters are saved in. One level deep, or it is not uploaded."""
    return "lora" if adapter_name == "default" else f"lora-{adapter_name}"


def check_twins(adapter_names: Collection[str], twins: Collection[str]) -> None:
    """Check, before anything is saved, that no adapter is saved where a twin goes.

    Args:
        adapter_names: all adapters that are saved.
        twins: those with a twin.

    Raises:
        ActValueError: one is.
    """
    for name in twins:
        if twin_folder(name) in adapter_names:
            raise ActValueError(
                f"lora_twin: got an adapter named {twin_folder(name)!r}, which is saved in the folder of the LoRA "
                f"twin of {name!r}, expected a different name (or lora_twin=False)"
            )


def write_twin(model: nn.Module, folder: Path, adapter_name: str) -> None:
    """Write the twin of an adapter; biases and norms are in it as whole modules.

    Args:
        model: the model with the adapter.
        folder: the folder that its adapters are saved in.
        adapter_name: name of the adapter.

    Warns:
        ActWarning: it has no LoRA form that PEFT loads. The adapter itself is saved.
    """
    twin = folder / twin_folder(adapter_name)
    try:
        export_lora(model, twin, adapter_name=adapter_name, biases=Biases.MODULES_TO_SAVE)
    except ActValueError as error:
        warnings.warn(f"the adapter is saved, its LoRA twin is not: {error}", ActWarning, stacklevel=4)
        return
    card = twin / "README.md"
    card.write_text(f"{card.read_text(encoding='utf-8')}\n{_MARK}\n", encoding="utf-8")


def remove_twin(folder: Path, adapter_name: str) -> None:
    """Remove the twin of an older version of an adapter, which would no longer be the same."""
    twin = folder / twin_folder(adapter_name)
    card = twin / "README.md"
    if not twin.is_symlink() and card.is_file() and _MARK in card.read_text(encoding="utf-8", errors="replace"):
        shutil.rmtree(twin)
