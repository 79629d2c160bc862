"""Checks of an adapter's tensors for one layer before they are loaded: files come from strangers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from act_peft.errors import ActLoadError


class Receiver(Protocol):
    """What the checks have to know of the layer that is about to load an adapter's tensors."""

    act_delta_index: BufferDict
    act_delta_channel_scale: nn.ParameterDict

    @property
    def num_channels(self) -> int: ...  # noqa: D102

    @property
    def has_bias(self) -> bool: ...  # noqa: D102

    def delta_shape(self, num_selected: int) -> tuple[int, ...]: ...  # noqa: D102

    def knows_channels(self, adapter_name: str) -> bool: ...  # noqa: D102


def check_adapter_state(
    layer: Receiver,
    adapter_name: str,
    state: Mapping[str, torch.Tensor],
    where: str,
    *,
    complete: bool = False,
) -> None:
    """Check the tensors of one adapter of a layer.

    Args:
        layer: the layer that will load them.
        adapter_name: name of the adapter.
        state: the given ones of `act_delta_weight`, `act_delta_bias`, `act_delta_channel_scale`, `act_delta_index`.
        where: name of the module, for messages.
        complete: whether a missing tensor is an error; wrong shapes of weights are left to the later check then, so
            that PEFT's `ignore_mismatched_sizes` can drop them first.

    Raises:
        ActLoadError: for a missing tensor, a wrong dtype or shape, and indices that are not ascending, not unique or
            outside `[0, C)`.
    """
    expected = ["act_delta_index", "act_delta_weight"] + (["act_delta_bias"] if layer.has_bias else [])
    if adapter_name in layer.act_delta_channel_scale:
        expected.append("act_delta_channel_scale")
    if layer.knows_channels(adapter_name):
        state = {"act_delta_index": layer.act_delta_index[adapter_name], **state}
    missing = [name for name in expected if name not in state]
    if missing and complete:
        raise ActLoadError(
            f"{where}: the adapter has no {' and no '.join(missing)}, expected {', '.join(expected)} "
            "(the file is incomplete or was made for another model)"
        )
    index = state.get("act_delta_index", layer.act_delta_index[adapter_name])
    if "act_delta_index" in state:
        _check_index(layer, adapter_name, index, where)
    for name in expected[1:]:
        if name not in state:
            continue
        tensor = state[name]
        if not tensor.is_floating_point():
            raise ActLoadError(f"{where}: {name} is {tensor.dtype}, expected a floating point dtype")
        shape = layer.delta_shape(index.numel()) if name == "act_delta_weight" else (index.numel(),)
        if tuple(tensor.shape) != shape and not complete:
            raise ActLoadError(
                f"{where}: size mismatch for {name}: the adapter has {list(tensor.shape)}, expected {list(shape)} "
                "(the adapter was made for another model)"
            )


def _check_index(layer: Receiver, adapter_name: str, index: torch.Tensor, where: str) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ActLoadError(
            f"{where}: channel indices are {index.dtype} of shape {list(index.shape)}, expected int64 of shape [K]"
        )
    reserved = layer.act_delta_index[adapter_name].numel()
    if reserved not in (0, index.numel()):
        raise ActLoadError(
            f"{where}: size mismatch: the adapter has {index.numel()} channels, expected {reserved} "
            "(its configuration and its tensors do not belong together)"
        )
    if index.device.type == "meta" or not index.numel():
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= layer.num_channels or not bool((index[1:] > index[:-1]).all()):
        raise ActLoadError(
            f"{where}: channel indices from {low} to {high}, expected ascending ones in [0, {layer.num_channels}) "
            "without repetition (the file is damaged or was made for another model)"
        )
