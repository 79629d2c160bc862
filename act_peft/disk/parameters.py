"""The parameters of a model in some source of tensors, by the model's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.shard import DTYPES, PLAIN_DTYPES
from act_peft.disk.sources import TensorSource
from act_peft.errors import ActValueError

_PLAIN = frozenset(DTYPES[name] for name in PLAIN_DTYPES)
_PARTS = ("weight", "bias")


class Parameters:
    """A model's parameters in some source, asked for by their names in the model; a `TensorSource`.

    Args:
        source: a checkpoint, or a model in memory.
        names: the parameter names.
        tied: as in `CheckpointKeys`.

    Attributes:
        location: name of the source in messages.
        names: the parameter names.
    """

    def __init__(self, source: TensorSource, names: Sequence[str], *, tied: Mapping[str, str] | None = None) -> None:
        self.location = source.location
        self.names = names
        self._source = source
        self._keys = CheckpointKeys(source, names, tied=tied)
        self._stored = {name: key for name in names if (key := self._keys.key(name)) is not None}

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def key(self, name: str) -> str:
        """The key of a parameter in the source; for a missing one, the key that it should have."""
        return self._stored.get(name) or self._keys.own_key(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._source.shape(self.key(name))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, and of weights and biases that the model does not have."""
        used = set(self._stored.values())
        surplus = {
            name: self._source.shape(key)
            for key in self._source.names
            if key not in used and key.rpartition(".")[2] in _PARTS and (name := self._keys.parameter(key)) is not None
        }
        return {**surplus, **{name: self.shape(name) for name in self._stored}}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter."""
        return self._source.dtype(self.key(name))

    def is_plain(self, name: str) -> bool:
        """Whether a parameter holds ordinary floating point numbers."""
        return self.dtype(name) in _PLAIN

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a parameter; `index` is int64 `[K]`, ascending.

        Raises:
            ActValueError: if its values are no ordinary floating point numbers.
        """
        if not self.is_plain(name):
            raise ActValueError(
                f"{self.location}: {self.key(name)} is {self.dtype(name)}, expected float64, float32, float16 or "
                "bfloat16 (the model is quantized: take the original one)"
            )
        return self._source.rows(self.key(name), index, dim)
