"""Which layers of a model carry an ACT adapter, and what is recorded about them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from act_peft.adapter.base_record import fingerprint, module_record
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers import ActLayer


def record(layer: ActLayer, index: torch.Tensor) -> dict[str, Any]:
    """What an adapter's configuration says about one module."""
    base = None
    if layer.get_base_layer().weight.device.type != "meta" and not layer.is_quantised:
        rows = layer.original_rows(index)
        base = fingerprint(rows.weight, rows.bias)
    return module_record(layer.kind, selected=index.numel(), channels=layer.num_channels, base=base)


def shared_weights(model: nn.Module) -> set[int]:
    """Ids of the weights that several modules use."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared


def base_model(model: nn.Module) -> nn.Module:
    """The model that the layers were injected into, without the wrappers of PEFT and `torch.compile` around it.

    Raises:
        ActTypeError: for a wrapper that trains in parallel.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ActTypeError(f"got a {type(model).__name__}, expected the model inside (its attribute `module`)")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, ActLayer]:
    """The ACT layers that have an adapter, by the names of their modules in the base model.

    Raises:
        ActValueError: if there is none.
    """
    layers = {
        name: module
        for name, module in base_model(model).named_modules()
        if isinstance(module, ActLayer) and adapter_name in module.act_delta_index
    }
    if not layers:
        raise ActValueError(
            f"{type(model).__name__}: has no ACT adapter {adapter_name!r}, expected one "
            "(create it with get_peft_model(model, ActConfig(channels=...)))"
        )
    return layers
