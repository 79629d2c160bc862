"""The parameters of a model in memory as they are without adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import nn

from act_peft.disk.quantization import quantization_method
from act_peft.layers import ActLayer
from act_peft.layers.lookup import embedding, output_head
from act_peft.offloading import values_of
from act_peft.peft_modules import plain_name
from act_peft.shards import full_shape


class ModelTensors:
    """The parameters of a model in memory, without adapters; a `TensorSource`.

    Args:
        model: the model, with or without adapters in it.

    Attributes:
        location: name of the model in messages.
        names: the names of all parameters, tied ones under each of their names.
        quantization: the method that the model is quantized with, by its configuration.
    """

    def __init__(self, model: nn.Module) -> None:
        self.location = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self._model = model
        self.quantization = quantization_method(getattr(model, "config", None))
        names = {
            plain_name(name): name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if not any(part in name for part in ("act_delta_", "modules_to_save.", "token_adapter."))
        }
        self._owners = {plain: model.get_submodule(name.rpartition(".")[0]) for plain, name in names.items()}
        self._parameters = {plain: model.get_parameter(name) for plain, name in names.items()}
        self.names: Sequence[str] = tuple(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return full_shape(self._parameters[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter."""
        return self._parameters[name].dtype

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a parameter; if an adapter is merged, the original ones."""
        module, _, part = name.rpartition(".")
        layer = self._model.get_submodule(module)
        if isinstance(layer, ActLayer) and dim != layer.kind.axis_of(part):
            everything = cast(torch.Tensor, getattr(layer.original_rows(torch.arange(layer.num_channels)), part))
            return everything.index_select(dim, index.to(everything.device))
        if isinstance(layer, ActLayer):
            return cast(torch.Tensor, getattr(layer.original_rows(index), part))
        values = values_of(self._owners[name], part, name=module)
        return values.index_select(dim, index.to(values.device))


def vocabulary_parameters(model: nn.Module) -> Collection[str]:
    """Names of the parameters whose first axis counts the tokens of the vocabulary."""
    modules = [embedding(model, "get_input_embeddings"), output_head(model)]
    shared = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return frozenset(plain_name(name) for name, parameter in names if id(parameter) in shared)
