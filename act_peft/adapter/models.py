"""Recognizing a model cheaply, in memory or on disk: its name, and hashes of a few rows of every module."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from act_peft.adapter.base_record import fingerprint
from act_peft.channels.kinds import is_quantized
from act_peft.channels.origin import ModelRecord
from act_peft.disk.locations import lasting_name
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActValueError
from act_peft.peft_modules import NamedModule, without_wrapper
from act_peft.shards import full_shape, whole

_ROWS = 4  # of a matrix; of a vector all elements


def sample_of(weight: torch.Tensor) -> str:
    """Hash of a few rows of a weight, the same ones whatever is selected, so that two adapters can be compared."""
    values = whole(weight)
    return fingerprint(values.index_select(0, _probe(values.shape).to(values.device)))


def name_of(model: nn.Module) -> str | None:
    """What a model calls itself: a Hub id, or the absolute folder that it was loaded from; None for others."""
    named = getattr(without_wrapper(model), "name_or_path", None)
    return lasting_name(named) if isinstance(named, str) and named else None


def record_in_memory(model: nn.Module, modules: Iterable[tuple[str, NamedModule]], *, as_base: bool) -> ModelRecord:
    """The record of a model in memory.

    Args:
        model: the model.
        modules: the modules to hash, by their names. Modules that an adapter changes are left out.
        as_base: whether the model counts without its adapters; then these modules are hashed too.
    """
    prints = {}
    for name, module in modules:
        weight: Any = getattr(module.layer, "weight", None)
        changed = module.called is not module.layer and not as_base
        if not changed and not getattr(module.called, "merged", False) and _is_readable(module.layer, weight):
            prints[name] = sample_of(weight)
    return ModelRecord(name_of(model), prints)


def record_of(parameters: Parameters, modules: Iterable[str]) -> ModelRecord:
    """The record of a model in some source of tensors, with the same hashes.

    Args:
        parameters: its parameters.
        modules: the modules to hash; those that cannot be read are left out.
    """
    prints = {}
    for name in modules:
        weight = f"{name}.weight"
        if weight not in parameters or not parameters.is_plain(weight) or 0 in parameters.shape(weight):
            continue
        with suppress(ActValueError):  # made of tensors by more than moving rows
            rows = parameters.rows(weight, _probe(parameters.shape(weight)), 0)
            if rows.device.type != "meta":
                prints[name] = fingerprint(rows)
    return ModelRecord(lasting_name(parameters.location), prints)


def _is_readable(layer: nn.Module, weight: object) -> bool:
    return (
        isinstance(weight, torch.Tensor)
        and not is_quantized(layer)
        and weight.device.type != "meta"
        and weight.is_floating_point()
        and 0 not in full_shape(weight)
    )


def _probe(shape: tuple[int, ...]) -> torch.Tensor:
    """The entries of the first axis that are hashed, int64, ascending."""
    count = shape[0]
    if len(shape) == 1 or count <= _ROWS:
        return torch.arange(count)
    return torch.arange(_ROWS) * (count - 1) // (_ROWS - 1)
