"""The parameters of base and donor by the base's names, in memory or on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import key_for, prefix_change
from act_peft.disk.shard import DTYPES, PLAIN_DTYPES
from act_peft.errors import ActValueError
from act_peft.layers import ActLayer

_PLAIN = frozenset(DTYPES[name] for name in PLAIN_DTYPES)
_PARTS = ("weight", "bias")


class ModelTensors:
    """The parameters of a model in memory as they are without adapters; asked as a `Checkpoint` is.

    Args:
        model: the model, with or without adapters in it.

    Attributes:
        location: what it is called in messages.
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
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter."""
        return self._parameters[name].dtype

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a parameter, as before any merge."""
        parameter = self._parameters[name]
        module, _, part = name.rpartition(".")
        layer = self._model.get_submodule(module)
        if isinstance(layer, ActLayer):
            return cast(torch.Tensor, getattr(layer.original_rows(index), part))
        return parameter.detach().index_select(dim, index.to(parameter.device))


class Parameters:
    """A model's parameters in some source, by their names in the base.

    Args:
        source: where they are.
        names: the base's parameter names.
        tied: parameter -> the parameter whose tensor it uses, for sources that have only one of them.

    Attributes:
        location: what the source is called in messages.
        names: the base's parameter names.
        keys: parameter name -> key in the source, for those that it has.
    """

    def __init__(
        self, source: Checkpoint | ModelTensors, names: Sequence[str], *, tied: Mapping[str, str] | None = None
    ) -> None:
        self.location = source.location
        self.names = names
        self._source = source
        self._change = prefix_change(names, source.names)
        self.keys = {name: key for name in names if (key := key_for(name, self._change)) in source}
        known = set(names)
        for one, other in (tied or {}).items():
            for missing, partner in ((one, other), (other, one)):
                if missing in known and missing not in self.keys and partner in self.keys:
                    self.keys[missing] = self.keys[partner]

    def __contains__(self, name: object) -> bool:
        return name in self.keys

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._source.shape(self.keys[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, and of weights and biases that the base does not have."""
        old, new = self._change
        used = set(self.keys.values())
        surplus = {
            old + key.removeprefix(new): self._source.shape(key)
            for key in self._source.names
            if key not in used and key.startswith(new) and key.rpartition(".")[2] in _PARTS
        }
        return {**surplus, **{name: self.shape(name) for name in self.keys}}

    def is_plain(self, name: str) -> bool:
        """Whether a parameter holds ordinary floating point numbers."""
        return self._source.dtype(self.keys[name]) in _PLAIN

    def rows(self, name: str, index: torch.Tensor, dim: int) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a parameter; `index` is int64 `[K]`, ascending.

        Raises:
            ActValueError: its values are no ordinary floating point numbers.
        """
        key = self.keys[name]
        if not self.is_plain(name):
            raise ActValueError(
                f"{self.location}: {key} is {self._source.dtype(key)}, expected float64, float32, float16 or bfloat16 "
                "(the model is quantised: take the original one)"
            )
        return self._source.rows(key, index, dim)


def plain_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output embedding, if it has one."""
    return _embedding(model, "get_output_embeddings")


def vocabulary_parameters(model: nn.Module) -> Collection[str]:
    """Names of the parameters whose first axis counts the tokens of the vocabulary."""
    modules = [_embedding(model, "get_input_embeddings"), output_head(model)]
    shared = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return frozenset(plain_name(name) for name, parameter in names if id(parameter) in shared)


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return cast("nn.Module | None", getattr(model, getter, lambda: None)())
    except (AttributeError, NotImplementedError):  # transformers models without such a layer
        return None
