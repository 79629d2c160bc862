"""What an adapter in a model changes, module by module."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from act_peft.adapter.changes import OUTER, AdapterChanges, ModuleChange, _as_rows, _nonzero
from act_peft.channels.rows import merged_rows
from act_peft.errors import ActValueError
from act_peft.layers import ActLayer
from act_peft.layers.lookup import adapter_layers, base_model


def changes_in_model(model: nn.Module, adapter_name: str) -> AdapterChanges:
    """The changes of an adapter in memory.

    Raises:
        ActValueError: if the model has no such adapter, or its tensors are still to be loaded.
    """
    layers = adapter_layers(model, adapter_name)
    for name, layer in layers.items():
        if not layer.knows_channels(adapter_name) or layer.act_delta_weight[adapter_name].device.type == "meta":
            raise ActValueError(
                f"{name}: adapter {adapter_name!r} has no tensors yet, expected a loaded adapter (load its state dict)"
            )
    root = base_model(model)
    extra = {}
    for name, wrapper in root.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            for key, tensor in wrapper.adapter_state_dict(adapter_name, wrapper.state_dict()).items():
                extra[f"{OUTER}{name}.{key}"] = tensor.detach().cpu()
    return AdapterChanges(
        config=cast(Any, model).peft_config[adapter_name],
        modules=[_from_layer(name, layer, adapter_name) for name, layer in layers.items()],
        extra=extra,
        known=[name for name, module in root.named_modules() if getattr(module, "weight", None) is not None],
        inputs=[],
        origin=f"adapter `{adapter_name}` of a model in memory",
    )


def _from_layer(name: str, layer: ActLayer, adapter_name: str) -> ModuleChange:
    scale = layer.act_delta_scale[adapter_name]
    index = layer.act_delta_index[adapter_name].cpu()
    weight = layer.act_delta_weight[adapter_name]
    plain = layer.get_base_layer()

    def read(part: str) -> torch.Tensor:
        return layer.delta(adapter_name, part).detach().cpu()

    def whole(part: str) -> torch.Tensor:
        everything = layer.original_rows(torch.arange(layer.num_channels))
        original = cast(torch.Tensor, getattr(everything, part)).cpu()
        changes = [(index, read(part), scale)]
        return merged_rows(original, everything.index.cpu(), changes, dim=layer.kind.axis_of(part))

    return ModuleChange(
        name=name,
        kind=layer.kind,
        num_channels=layer.num_channels,
        index=index,
        width=weight.numel() // index.numel(),
        dtype=layer.delta_dtype(adapter_name),
        rows=lambda: _as_rows(read("weight") * scale, layer.kind),
        has_bias=layer.has_bias,
        bias=_nonzero(read("bias") * scale) if layer.has_bias else None,
        whole_infos=lambda: {n: (p.dtype, tuple(p.shape)) for n, p in plain.named_parameters()},
        whole=whole,
    )
