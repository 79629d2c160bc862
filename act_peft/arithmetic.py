"""The arithmetic of rows, the same for a model in memory and for a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Channels int64 [K], ascending; their delta, K along the axis of the channels; its factor.
ScaledDelta = tuple[torch.Tensor, torch.Tensor, float]


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which rows of these dtypes are added: float32, or wider if one of them is."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def merged_rows(
    original: torch.Tensor, index: torch.Tensor, deltas: Iterable[ScaledDelta], *, dim: int
) -> torch.Tensor:
    """Original rows plus scaled deltas, rounded once.

        merged[i] = round(original[i] + sum over deltas of scale * delta[i])

    The sum is in `wide_dtype` and in the order of `deltas`, which therefore decides about the last bit.

    Args:
        original: parameters of K channels, with K along axis `dim`; not changed.
        index: int64 `[K]`, ascending: the channels of `original`.
        deltas: channels (a subset of `index`), delta and factor each.
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


def scaled_difference(donor: torch.Tensor, base: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * (donor - base)` in `wide_dtype` of both, on the device of `base`; any equal shapes."""
    wide = wide_dtype(donor.dtype, base.dtype)
    return scale * (donor.to(base.device, wide) - base.to(wide))
