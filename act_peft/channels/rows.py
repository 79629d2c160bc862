"""The parameters of some channels of a module, and their arithmetic: the same in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Channels int64 [K], ascending; their delta, K along the axis of the channels; its factor.
ScaledDelta = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True)
class ChannelRows:
    """The parameters of some channels of one module.

    `weight` has the module's own orientation: `[K, I]` for a linear layer, `[I, K]` for Conv1D, `[V, K]` for an
    embedding, `[K]` for a norm. `bias` is `[K]`, or None if the module has none.
    """

    index: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def without_bias(self) -> ChannelRows:
        """The same rows without the elements of the bias."""
        return ChannelRows(self.index, self.weight, None)


@contextmanager
def exact_arithmetic(device_type: str = "cpu") -> Iterator[None]:
    """For arithmetic of weights within the user's autocast, which is for the passes of models.

    Products are not rounded to autocast's dtype, and its casts of weights as they were before are forgotten.

    Args:
        device_type: where the arithmetic takes place.
    """
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype for sums of rows of these dtypes: float32, or wider if one of them is wider."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def merged_rows(
    original: torch.Tensor, index: torch.Tensor, deltas: Iterable[ScaledDelta], *, dim: int
) -> torch.Tensor:
    """Original rows plus scaled deltas, rounded once.

        merged[i] = round(original[i] + sum over deltas of scale * delta[i])

    The sum is in `wide_dtype` and in the order of `deltas`; a different order can change the last bit.

    Args:
        original: parameters of K channels, with K along axis `dim`; not changed.
        index: int64 `[K]`, ascending: the channels of `original`.
        deltas: for each delta its channels (a subset of `index`), its values and its factor.
        dim: axis of the channels.

    Returns:
        A tensor of the shape, dtype and device of `original`.
    """
    total = original.to(wide_dtype(original.dtype), copy=True)
    for channels, delta, scale in deltas:
        delta = delta.to(total)
        if scale != 1.0:
            delta = delta * scale
        if channels.numel() == index.numel():
            total += delta
        else:
            total.index_add_(dim, torch.searchsorted(index, channels.to(index.device)), delta)
    return total.to(original.dtype)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, in a tenth of the time of `torch.isfinite`."""
    return not values.numel() or all(bool(torch.isfinite(end)) for end in values.aminmax())


def wide_difference(donor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`donor - base` in `wide_dtype` of both, a new tensor on the device of `base`; any equal shapes."""
    return donor.to(base.device, wide_dtype(donor.dtype, base.dtype), copy=True).sub_(base)


def scaled_channels(rows: torch.Tensor, scales: torch.Tensor, dim: int) -> torch.Tensor:
    """Every channel times its scale, in `wide_dtype` of both, on the device of the scales.

    Args:
        rows: K along axis `dim`, on any device.
        scales: `[K]`.
        dim: axis of the channels.
    """
    wide = wide_dtype(rows.dtype, scales.dtype)
    shape = [1] * rows.dim()
    shape[dim] = -1
    return rows.to(scales.device).to(wide) * scales.to(wide).view(shape)
