"""The parameters of a model in some source of tensors, by the model's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from act_peft.disk.keys import CheckpointKeys, Fits, Recognize
from act_peft.disk.quantization import quantized_weight
from act_peft.disk.shard import PLAIN
from act_peft.disk.sources import TensorSource
from act_peft.errors import ActValueError

_PARTS = ("weight", "bias")


class Parameters:
    """A model's parameters in some source, asked for by their names in the model; a `TensorSource`.

    Args:
        source: a checkpoint, or a model in memory.
        names: the parameter names.
        fits, recognize, model_types: as in `CheckpointKeys`.

    Attributes:
        location: name of the source in messages.
        names: the parameter names.
        quantization: as in `TensorSource`.

    Raises:
        ActValueError: as `CheckpointKeys`.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Sequence[str],
        *,
        fits: Fits | None = None,
        recognize: Recognize | None = None,
        model_types: Collection[str] = (),
    ) -> None:
        self.location = source.location
        self.names = names
        self._keys = CheckpointKeys(source, names, fits=fits, recognize=recognize, model_types=model_types)
        self.quantization = source.quantization
        self._held = frozenset(name for name in names if self._keys.holds(name))

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def key(self, name: str) -> str:
        """The key of a parameter in the source; for a missing one, the key that it should have."""
        return self._keys.key(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._keys.shape(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, and of weights and biases that the model does not have."""
        surplus = {
            name: self._keys.shape(name)
            for own in self._keys.surplus
            if own.rpartition(".")[2] in _PARTS
            and (name := self._keys.parameter(own)) is not None
            and name not in self._held
            and self._keys.own_name(name) == own
        }
        return {**surplus, **{name: self.shape(name) for name in self.names if name in self._held}}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter."""
        return self._keys.dtype(name)

    def is_plain(self, name: str) -> bool:
        """Whether a parameter holds ordinary floating point numbers."""
        return self.dtype(name) in PLAIN

    def check_unquantized(self, shapes: Mapping[str, Sequence[int] | None]) -> None:
        """Check that a model that calls itself quantized has some parameters as plain numbers all the same.

        Args:
            shapes: parameter -> the shape of its plain numbers; None: any.

        Raises:
            ActValueError: it does not.
        """
        for name, shape in shapes.items() if self.quantization is not None else ():
            fits = name in self and self.is_plain(name) and (shape is None or self.shape(name) == tuple(shape))
            if not fits:
                raise quantized_weight(self.location, self.key(name), str(self.quantization))

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a parameter; `index` is int64 `[K]`, ascending.

        Raises:
            ActValueError: its values are no ordinary floating point numbers, or cannot be read from files.
        """
        if not self.is_plain(name):
            raise ActValueError(
                f"{self.location}: {self.key(name)} is {self.dtype(name)}, expected float64, float32, float16 or "
                "bfloat16 (the model is quantized: take the original one)"
            )
        return self._keys.rows(name, index, dim)
