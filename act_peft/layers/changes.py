"""The changes of an adapter in a model, module by module."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from act_peft.adapter.changes import AdapterChanges, ModuleChange, OtherTensor
from act_peft.disk.writing import TensorInfos
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.layers import ActLayer
from act_peft.layers.lookup import adapter_layers, base_model
from act_peft.plain import in_markdown


def changes_in_model(model: nn.Module, adapter_name: str) -> AdapterChanges:
    """The changes of an adapter in memory.

    Raises:
        ActValueError: the model has no such adapter, or its tensors are not loaded yet.
    """
    layers = adapter_layers(model, adapter_name)
    for name, layer in layers.items():
        if layer.act_delta_weight[adapter_name].device.type == "meta":
            raise ActValueError(
                f"{name}: adapter {adapter_name!r} has no tensors yet, expected a loaded adapter (load its state dict)"
            )
    root = base_model(model)
    extra = {}
    for name, wrapper in root.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            for key, tensor in wrapper.adapter_state_dict(adapter_name, wrapper.state_dict()).items():
                extra[f"{OUTER}{name}.{key}"] = OtherTensor(tensor.dtype, tuple(tensor.shape), tensor.detach().cpu)
    return AdapterChanges(
        config=cast(Any, model).peft_config[adapter_name],
        modules=[LayerChange(name, layer, adapter_name) for name, layer in layers.items()],
        extra=extra,
        of_base={},
        known=[name for name, module in root.named_modules() if getattr(module, "weight", None) is not None],
        inputs=[],
        origin=f"adapter `{in_markdown(adapter_name)}` of a model in memory",
    )


class LayerChange(ModuleChange):
    """One module of an adapter in memory.

    Args:
        name: name of the module in the base model.
        layer: its layer.
        adapter_name: name of the adapter.
    """

    def __init__(self, name: str, layer: ActLayer, adapter_name: str) -> None:
        self._layer, self._adapter_name = layer, adapter_name
        self.name, self.kind, self.num_channels = name, layer.kind, layer.num_channels
        self.index = layer.act_delta_index[adapter_name].cpu()
        self.width = 1 if layer.kind.is_norm else layer.in_features
        self.dtype = layer.delta_dtype(adapter_name)
        self.has_bias = layer.changes_bias(adapter_name)
        self.scale = layer.act_delta_scale[adapter_name]

    def whole_infos(self) -> TensorInfos:
        """See `ModuleChange.whole_infos`."""
        plain = self._layer.get_base_layer()
        return {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in plain.named_parameters()}

    def _delta(self, part: str) -> torch.Tensor:
        return self._layer.whole_delta(self._adapter_name, part).cpu()

    def _original(self, part: str) -> torch.Tensor:
        everything = self._layer.original_rows(torch.arange(self.num_channels))
        return cast(torch.Tensor, getattr(everything, part)).cpu()
