"""The interface of donors: the difference donor - base for some channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

import torch

from act_peft.disk.parameters import Parameters


class OpenDonor(ABC):
    """A donor that fits the base; a context manager that closes its files.

    Attributes:
        location: folder, Hub id or name of the donor, for messages.
        notes: one sentence for each harmless difference from the base.
        is_adapter: whether the donor is the base with an adapter; then it is a relative, however large the difference.
        parameters: the parameters of a donor that has all of them.
    """

    location: str
    notes: list[str]
    is_adapter = True
    parameters: Parameters | None = None

    @abstractmethod
    def difference(self, module: str, part: str, index: torch.Tensor, dim: int, base: torch.Tensor) -> torch.Tensor:
        """The difference donor - base of the selected channels.

        Args:
            module: name of the module in the base.
            part: `"weight"` or `"bias"`.
            index: the selected channels, int64 `[K]`, ascending.
            dim: the axis of the channels.
            base: the base's values of these channels, K along `dim`.

        Returns:
            The difference, with the shape and device of `base`, in float32 or wider; the caller may overwrite it.
        """

    def common_channels(self, module: str) -> int | None:
        """The number of the module's channels that the donor has, if it has fewer than the base."""
        return None

    def close(self) -> None:  # noqa: B027 (a donor in memory has nothing to close)
        """Close all files; closing twice is harmless."""

    def __enter__(self) -> OpenDonor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
