"""What ACT and LoRA adapters made of a fitted transfer have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from act_peft.channels.rows import wide_dtype
from act_peft.disk.parameters import Parameters
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.fitting.base_weights import rows_of
from act_peft.fitting.module import Modules

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


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that does not depend on the current folder."""
    return Path(os.path.abspath(path))
