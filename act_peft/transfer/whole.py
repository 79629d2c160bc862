"""Changing whole parameters of a model in memory and changing them back, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import TracebackType

import torch
from torch import nn

from act_peft.channels.rows import wide_dtype

Changes = Iterable[tuple[str, torch.Tensor]]  # name of a parameter, what is added to it


class WholeMoves:
    """Sets parameters to `base + change`; a context manager.

    Afterwards, also after an exception, every byte is as before. A parameter that several modules use (tied
    embeddings) stays one parameter, so all its uses move.

    Memory: a copy of the parameters, on their device.

    Args:
        base: a model without adapters.
        names: names of the parameters that may change.
    """

    def __init__(self, base: nn.Module, names: Collection[str]) -> None:
        self._parameters = {name: base.get_parameter(name) for name in names}
        self._originals: dict[str, torch.Tensor] = {}
        self._moved: set[str] = set()

    def __enter__(self) -> WholeMoves:
        self._originals = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore_()
        self._originals = {}

    def move_(self, changes: Changes) -> None:
        """Add changes to some parameters; all others are as they were at the start.

            parameter = round(base + change)          rounded once, to the base's dtype

        Args:
            changes: read one by one. While one is read, its parameter still holds the base's values.
        """
        self.restore_()
        for name, change in changes:
            original = self._originals[name]
            wide = wide_dtype(original.dtype, change.dtype)
            self._moved.add(name)  # first, because a write may be interrupted
            _write(self._parameters[name], original.to(wide) + change.to(original.device, wide))
        torch.clear_autocast_cache()  # of casts of the weights as they were

    def restore_(self) -> None:
        """Give every parameter its bytes back."""
        for name in list(self._moved):
            _write(self._parameters[name], self._originals[name])
            self._moved.discard(name)
        torch.clear_autocast_cache()


def _write(parameter: nn.Parameter, values: torch.Tensor) -> None:
    # Through `data`, because a graph that the user has not called backward on may hold the parameter: its bytes will
    # be the same again.
    parameter.data.copy_(values)
