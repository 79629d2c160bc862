"""The layers of a model that have an ACT adapter, and facts about the modules of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from act_peft.adapter.base_record import fingerprint, module_record
from act_peft.adapter.models import sample_of
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers import ActLayer
from act_peft.offloading import has_values


def record(layer: ActLayer, index: torch.Tensor, *, include_bias: bool) -> dict[str, Any]:
    """The entry of one module in `ActConfig.adapted_modules`; the fingerprint is that of what the adapter changes."""
    base = sample = None
    if has_values(layer.get_base_layer()) and not layer.is_quantized:
        rows = layer.original_rows(index)
        base = fingerprint(rows.weight, rows.bias if include_bias else None)
        weight = layer.get_base_layer().weight
        if layer.merged_adapters or weight.device.type == "meta":
            weight = layer.original_rows(torch.arange(layer.num_channels)).weight
        sample = sample_of(weight)
    return module_record(layer.kind, selected=index.numel(), channels=layer.num_channels, base=base, sample=sample)


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules use."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in uses.items() if count > 1}


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output embedding, if it has one."""
    return embedding(model, "get_output_embeddings")


def embedding(model: nn.Module, getter: str) -> nn.Module | None:
    """What `get_input_embeddings` or `get_output_embeddings` of a model returns; None for a model without it."""
    try:
        return cast("nn.Module | None", getattr(model, getter, lambda: None)())
    except (AttributeError, NotImplementedError):  # transformers models without such a layer
        return None


def act_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, ActLayer]:
    """The ACT layers of a model by the names of their modules.

    Args:
        model: any module; the names are those inside it.
        adapter_name: only the layers that have this adapter.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActLayer) and (adapter_name is None or adapter_name in module.act_delta_index)
    }


def base_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of PEFT and `torch.compile`.

    Raises:
        ActTypeError: a wrapper for parallel training.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ActTypeError(f"got a {type(model).__name__}, expected the model inside (its attribute `module`)")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, ActLayer]:
    """The layers of an adapter by the names of their modules in the base model.

    Raises:
        ActValueError: if there is none.
        ActLoadError: if its tensors are not loaded, or do not fit.
    """
    layers = act_layers(base_model(model), adapter_name)
    for layer in layers.values():
        layer.settle([adapter_name])
    if not layers:
        raise ActValueError(
            f"{type(model).__name__}: has no ACT adapter {adapter_name!r}, expected one "
            "(create it with get_peft_model(model, ActConfig(channels=...)))"
        )
    return layers


def check_unmerged(layers: Mapping[str, ActLayer], adapter_name: str) -> None:
    """Check that an adapter is not merged.

    Raises:
        ActValueError: it is merged.
    """
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ActValueError(
                f"{name}: adapter {adapter_name!r} is merged, expected an unmerged one (unmerge first)"
            )
