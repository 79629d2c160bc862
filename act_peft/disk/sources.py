"""Sources of tensors: a donor is anything that can be asked for rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class TensorSource(Protocol):
    """Named tensors, read row by row: a file, a checkpoint, a model in memory, or the parameters of one of these.

    Attributes:
        location: name of the source in messages.
    """

    location: str

    @property
    def quantization(self) -> str | None:
        """The method that the model is quantized with, if it says so."""

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors."""

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a tensor; `index` is int64 `[K]`, ascending."""
