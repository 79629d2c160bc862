"""Checks of an adapter's tensors for one layer before they are loaded. Files may come from strangers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from act_peft.errors import ActLoadError

SELECTED = -1  # in a shape: the number of selected channels, which the adapter's indices decide


@dataclass(frozen=True)
class ExpectedState:
    """The tensors that a layer expects of one adapter.

    Attributes:
        num_channels: number of channels C of the module.
        index: the layer's channels, int64 `[K]`; -1 for those that the adapter brings, K = 0 for an unknown number.
        knows_channels: whether the channels are known before anything is loaded.
        shapes: tensor name -> shape, `SELECTED` in place of K. Does not include the index.
    """

    num_channels: int
    index: torch.Tensor
    knows_channels: bool
    shapes: Mapping[str, tuple[int, ...]]


def check_adapter_state(
    expected: ExpectedState, state: Mapping[str, torch.Tensor], where: str, *, complete: bool = False
) -> None:
    """Check the tensors of one adapter of a layer.

    Args:
        expected: the tensors that the layer expects.
        state: the tensors to load, by `act_delta_weight`, `act_delta_bias`, `act_delta_channel_scale`,
            `act_delta_index`.
        where: name of the module, for messages.
        complete: whether a missing tensor is an error. Wrong shapes of weights are then left to the later check, so
            that PEFT's `ignore_mismatched_sizes` can drop them first.

    Raises:
        ActLoadError: a missing tensor, a wrong dtype or shape, indices that are not ascending, not unique or outside
            `[0, C)`.
    """
    if expected.knows_channels:
        state = {"act_delta_index": expected.index, **state}
    names = ["act_delta_index", *expected.shapes]
    missing = [name for name in names if name not in state]
    if missing and complete:
        raise ActLoadError(
            f"{where}: the adapter has no {' and no '.join(missing)}, expected {', '.join(names)} "
            "(the file is incomplete or was made for another model)"
        )
    index = state.get("act_delta_index", expected.index)
    if "act_delta_index" in state:
        _check_index(expected, index, where)
    for name, pattern in expected.shapes.items():
        if name not in state:
            continue
        tensor = state[name]
        if not tensor.is_floating_point():
            raise ActLoadError(f"{where}: {name} is {tensor.dtype}, expected a floating point dtype")
        shape = tuple(index.numel() if size == SELECTED else size for size in pattern)
        if tuple(tensor.shape) != shape and not complete:
            raise ActLoadError(
                f"{where}: size mismatch for {name}: the adapter has {list(tensor.shape)}, expected {list(shape)} "
                "(the adapter was made for another model)"
            )


def _check_index(expected: ExpectedState, index: torch.Tensor, where: str) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ActLoadError(
            f"{where}: channel indices are {index.dtype} of shape {list(index.shape)}, expected int64 of shape [K]"
        )
    reserved = expected.index.numel()
    if reserved not in (0, index.numel()):
        raise ActLoadError(
            f"{where}: size mismatch: the adapter has {index.numel()} channels, expected {reserved} "
            "(its configuration and its tensors do not belong together)"
        )
    if index.device.type == "meta" or not index.numel():
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= expected.num_channels or not bool((index[1:] > index[:-1]).all()):
        raise ActLoadError(
            f"{where}: channel indices from {low} to {high}, expected ascending ones in [0, {expected.num_channels}) "
            "without repetition (the file is damaged or was made for another model)"
        )
