"""The one check of an adapter's tensors for one module. Whoever reads or loads tensors calls it.

| who | when | what is known then |
|---|---|---|
| `adapter.stored.read_deltas` | `ActConfig.from_pretrained` of a folder; `AdapterFolder` (merge, combine, export, donor, inspect) | the file: header, indices, the record in `adapter_config.json` |
| `ActModel._remap_adapter_state_dict_for_load` | PEFT has read a whole adapter | the model; nothing may be missing |
| `ActModel._load_from_state_dict` | torch, before any copy (`load_state_dict`) | the model; shapes too |
| `LoadableLayer._load_from_state_dict` | torch, for each layer | the module |
| `tuner.awaited.Awaited.settle` | transformers' `load_adapter` has assigned the tensors; before the first forward pass or merge | the model, and what has arrived in it |

Files may come from strangers.
"""  # noqa: E501 (a table)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from act_peft.disk.shard import PLAIN
from act_peft.errors import ActLoadError

INDEX, WEIGHT, BIAS, SCALES = "act_delta_index", "act_delta_weight", "act_delta_bias", "act_delta_channel_scale"
SELECTED = -1  # in a shape: the number of selected channels, which the adapter's indices decide
ANY = -2  # in a shape: a number that is not known


@dataclass(frozen=True)
class ExpectedState:
    """The tensors that are expected of one adapter for one module.

    Attributes:
        num_channels: number of channels C of the module; None if it is not known.
        num_selected: number of selected channels K; None if only the tensors can tell.
        shapes: tensor name -> the shapes that it may have, with `SELECTED` and `ANY`. Does not include the index.
        optional: names in `shapes` that may be missing.
        index: the channels, if they are known before anything is loaded.
    """

    num_channels: int | None
    num_selected: int | None
    shapes: Mapping[str, Sequence[tuple[int, ...]]]
    optional: frozenset[str] = frozenset()
    index: torch.Tensor | None = None


def check_state(
    expected: ExpectedState,
    state: Mapping[str, torch.Tensor],
    where: str,
    *,
    complete: bool = True,
    with_shapes: bool = True,
) -> None:
    """Check the tensors of one adapter for one module.

    Args:
        expected: the tensors that are expected.
        state: the tensors by the names at the top of this file; on the meta device only dtype and shape count.
        where: name of the module, for messages.
        complete: whether a missing tensor is an error.
        with_shapes: whether the shapes of all tensors but the index are checked.

    Raises:
        ActLoadError: a missing or unknown tensor, a wrong dtype or shape, indices that are not ascending, not unique
            or outside `[0, C)`.
    """
    if expected.index is not None:
        state = {INDEX: expected.index, **state}
    needed = [INDEX, *(name for name in expected.shapes if name not in expected.optional)]
    missing = [name for name in needed if name not in state]
    if missing and complete:
        raise ActLoadError(
            f"{where}: the adapter has no {' and no '.join(missing)}, expected {', '.join(needed)} "
            "(the file is incomplete or was made for another model)"
        )
    unknown = [name for name in state if name != INDEX and name not in expected.shapes]
    if unknown:
        raise ActLoadError(
            f"{where}: the adapter has {unknown[0]}, expected {', '.join(needed)} only (its configuration and its "
            "tensors do not belong together)"
        )
    index = state.get(INDEX)
    if index is not None:
        _check_index(expected, index, where)
    count = expected.num_selected if index is None else index.numel()
    for name, patterns in expected.shapes.items():
        if name not in state:
            continue
        tensor = state[name]
        if tensor.dtype not in PLAIN:
            raise ActLoadError(f"{where}: {name} is {tensor.dtype}, expected a floating point dtype")
        if with_shapes and not any(_fits(tensor.shape, pattern, count) for pattern in patterns):
            allowed = " or ".join(dict.fromkeys(_shape_text(pattern, count) for pattern in patterns))
            raise ActLoadError(
                f"{where}: size mismatch for {name}: the adapter has {list(tensor.shape)}, expected {allowed} "
                "(the file is damaged or was made for another model)"
            )


def _check_index(expected: ExpectedState, index: torch.Tensor, where: str) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ActLoadError(
            f"{where}: channel indices are {index.dtype} of shape {list(index.shape)}, expected int64 of shape [K]"
        )
    if expected.num_selected not in (None, index.numel()):
        raise ActLoadError(
            f"{where}: size mismatch: the adapter has {index.numel()} channels, expected {expected.num_selected} "
            "(its configuration and its tensors do not belong together)"
        )
    if index.device.type == "meta" or not index.numel():
        return
    channels, most = index.detach().cpu().numpy(), expected.num_channels
    inside = channels[0] >= 0 and (most is None or channels[-1] < most)
    if not inside or not (channels[1:] > channels[:-1]).all():
        low, high = int(channels.min()), int(channels.max())
        raise ActLoadError(
            f"{where}: channel indices from {low} to {high}, expected ascending ones "
            f"{'from 0 on' if most is None else f'in [0, {most})'} without repetition (the file is damaged or was "
            "made for another model)"
        )


def _fits(shape: Sequence[int], pattern: Sequence[int], count: int | None) -> bool:
    return len(shape) == len(pattern) and all(
        size == ANY or length == (count if size == SELECTED else size) or (size == SELECTED and count is None)
        for length, size in zip(shape, pattern, strict=True)
    )


def _shape_text(pattern: Sequence[int], count: int | None) -> str:
    words = {ANY: "any", SELECTED: "K" if count is None else str(count)}
    return f"[{', '.join(words.get(size, str(size)) for size in pattern)}]"
