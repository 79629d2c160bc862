"""What every donor can be asked: the difference that it would make to some channels of the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

import torch


class OpenDonor(ABC):
    """A donor that has been checked against the base; a context manager.

    Attributes:
        location: what the user named.
        notes: what differs from the base harmlessly, in words.
        is_adapter: whether it is the base itself with an adapter, and so a relative however much it differs.
    """

    location: str
    notes: list[str]
    is_adapter = True

    @abstractmethod
    def difference(self, module: str, part: str, index: torch.Tensor, dim: int, base: torch.Tensor) -> torch.Tensor:
        """What the donor's channels are more than the base's.

        Args:
            module: name of the module in the base.
            part: `"weight"` or `"bias"`.
            index: the selected channels, int64 `[K]`, ascending.
            dim: the axis of the channels.
            base: these channels of the base, K along `dim`.

        Returns:
            Donor minus base, of the shape and device of `base`, in float32 or wider; the caller may write to it.
        """

    def common_channels(self, module: str) -> int | None:
        """How many of the module's channels the donor has, where it has fewer than the base."""
        return None

    def close(self) -> None:  # noqa: B027 (a donor in memory has nothing to close)
        """Close all files; closing twice is harmless."""

    def __enter__(self) -> OpenDonor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
