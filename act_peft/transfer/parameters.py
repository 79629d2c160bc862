"""The parameters of a model in memory as they are without adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import nn

from act_peft.layers import ActLayer
from act_peft.layers.lookup import embedding, output_head
from act_peft.peft_modules import plain_name
from act_peft.shards import full_shape, rows_of


class ModelTensors:
    """The parameters of a model in memory, without adapters; a `TensorSource`.

    Args:
        model: the model, with or without adapters in it.

    Attributes:
        location: name of the model in messages.
        names: the names of all parameters, tied ones under each of their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.location = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self._model = model
        self._parameters = {
            plain_name(name): parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not any(part in name for part in ("act_delta_", "modules_to_save.", "token_adapter."))
        }
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
        parameter = self._parameters[name]
        module, _, part = name.rpartition(".")
        layer = self._model.get_submodule(module)
        if isinstance(layer, ActLayer):
            return cast(torch.Tensor, getattr(layer.original_rows(index), part))
        return rows_of(parameter, index, dim)


def vocabulary_parameters(model: nn.Module) -> Collection[str]:
    """Names of the parameters whose first axis counts the tokens of the vocabulary."""
    modules = [embedding(model, "get_input_embeddings"), output_head(model)]
    shared = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return frozenset(plain_name(name) for name, parameter in names if id(parameter) in shared)
