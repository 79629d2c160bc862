"""What ACT and LoRA adapters made of a fitted transfer have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from act_peft.channels.rows import wide_dtype
from act_peft.disk.atomic import new_folder
from act_peft.disk.folders import check_room
from act_peft.disk.parameters import Parameters
from act_peft.disk.writing import size_of, write_tensors
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.fitting.base_weights import rows_of
from act_peft.fitting.module import Modules

_SLACK = 1 << 20  # bytes kept free for configuration and card
Tensors = dict[str, torch.Tensor]


def token_tensors(modules: Modules, tokens: Mapping[str, torch.Tensor], base: Parameters | None) -> Tensors:
    """PEFT stores the new rows themselves, not their change."""
    tensors = {}
    for name, index in tokens.items():
        rows = rows_of(needed_base(base, name), name, modules[name], index)  # [K, H]
        moved = rows.to(wide_dtype(rows.dtype)) + modules[name].delta[index]
        tensors[f"{OUTER}{name}.token_adapter.trainable_tokens_delta"] = moved.to(rows.dtype)
    return tensors


def needed_base(base: Parameters | None, name: str) -> Parameters:
    """The base's weights.

    Raises:
        ActValueError: they cannot be reached.
    """
    if base is None:
        raise ActValueError(
            f"{name}: is saved with the base's weights in it, which cannot be reached, expected base=... (the model, "
            "or the folder or Hub id of its checkpoint; or leave norms and tokens out)"
        )
    return base


def token_indices(tokens: Mapping[str, torch.Tensor]) -> dict[str, list[int]] | None:
    """What a configuration says of the tokens, None for none."""
    return {name: index.tolist() for name, index in tokens.items()} or None


def write_adapter(output: Path, tensors: Tensors, config: Any, card: str | None, *, overwrite: bool) -> None:
    """Write an adapter's folder, whole or not at all.

    Args:
        output: the folder.
        tensors: key -> tensor.
        config: PEFT's configuration.
        card: its README; None where the configuration writes it.
        overwrite: whether an older adapter is replaced.

    Raises:
        ActValueError: no room on the disk, or it refuses a write.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    infos = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered.items()}
    check_room(output, size_of(infos) + _SLACK)
    with new_folder(output, overwrite=overwrite) as folder:
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, infos, ordered.values())
        if card is not None:
            ModelCard(card).save(folder / "README.md")
        config.save_pretrained(str(folder))


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that does not depend on the current folder."""
    return Path(os.path.abspath(path))
