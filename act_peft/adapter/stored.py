"""The channel deltas in an adapter's file, as far as the file and its record alone can tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.adapter.state import ANY, BIAS, INDEX, SCALES, SELECTED, WEIGHT, ExpectedState, check_state
from act_peft.channels.kinds import ChannelKind
from act_peft.disk.shard import DTYPES, Shard
from act_peft.doors import COMPILED, OUTER
from act_peft.errors import ActLoadError

PARTS = (INDEX, WEIGHT, BIAS, SCALES)


@dataclass(frozen=True)
class StoredDelta:
    """The deltas of one module in a file: channels, int64 `[K]`, ascending, and the keys of the tensors.

    `scales` are the learned scales, float `[K]`, that the rows are multiplied with; None if there are none.
    """

    index: torch.Tensor
    weight: str
    weight_shape: tuple[int, ...]
    bias: str | None
    scales: torch.Tensor | None


def read_deltas(
    shard: Shard, where: str, *, recorded: Mapping[str, Any] | None = None, has_scales: bool | None = None
) -> dict[str, StoredDelta]:
    """The channel deltas in a file, checked as far as the file and its configuration alone can tell.

    Tensors of modules that the adapter saves as a whole, and of tokens, are not looked at.

    Args:
        shard: the file.
        where: the adapter, for messages.
        recorded: the record of its modules, `adapted_modules`, if there is one.
        has_scales: whether it has learned scales, if that is known.

    Raises:
        ActLoadError: a tensor that is missing, has a wrong dtype or shape, or contradicts the record of its module;
            indices that are not ascending, not unique or out of range; modules that the record does not have, or
            that only the record has.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in shard.tensors:
        module, _, part = key.removeprefix(OUTER).rpartition(".")
        if part in PARTS:
            parts.setdefault(module, {})[part] = key
    known = {name.removeprefix(COMPILED): entry for name, entry in (recorded or {}).items()}
    if known:
        _check_same_modules(where, known, {name.removeprefix(COMPILED) for name in parts})
    deltas = {}
    for module, keys in parts.items():
        entry = known.get(module.removeprefix(COMPILED), {})
        state = {part: _looked_at(shard, part, key) for part, key in keys.items()}
        check_state(_expected(entry, has_scales), state, f"{where}: {module}")
        deltas[module] = StoredDelta(
            state[INDEX], keys[WEIGHT], tuple(state[WEIGHT].shape), keys.get(BIAS), state.get(SCALES)
        )
    return deltas


def _looked_at(shard: Shard, part: str, key: str) -> torch.Tensor:
    """Indices and scales with their values; of other tensors only dtype and shape."""
    info = shard.info(key)
    small = {INDEX: info.dtype == "I64" and len(info.shape) == 1, SCALES: info.is_plain and len(info.shape) == 1}
    if small.get(part):
        return shard.tensor(key)
    return torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.uint8), device="meta")


_KINDS = {kind.value: kind for kind in ChannelKind}
_WEIGHTS = {
    kind: (SELECTED,) if kind.is_norm else (SELECTED, ANY) if kind.channel_dim == 0 else (ANY, SELECTED)
    for kind in ChannelKind
}
_ANY_WEIGHT = sorted(set(_WEIGHTS.values()), key=str)


def _expected(entry: Mapping[str, Any], has_scales: bool | None) -> ExpectedState:
    """What the record of a module says about its tensors. Adapters of version 0.1 record less."""
    kind = _KINDS.get(entry.get("kind", ""))
    return ExpectedState(
        num_channels=entry.get("channels"),
        num_selected=entry.get("selected"),
        shapes={
            WEIGHT: _ANY_WEIGHT if kind is None else [_WEIGHTS[kind]],
            BIAS: [(SELECTED,)],
            **({} if has_scales is False else {SCALES: [(SELECTED,)]}),
        },
        optional=frozenset({BIAS} if has_scales else {BIAS, SCALES}),
    )


def _check_same_modules(where: str, recorded: Mapping[str, Any], stored: Collection[str]) -> None:
    lost = [name for name, entry in recorded.items() if name not in stored and entry.get("selected") != 0]
    if lost:
        raise ActLoadError(
            f"{where}: adapter_config.json records channels of {lost[0]}, expected their tensors too ({len(lost)} of "
            f"{len(recorded)} modules have none; the file is incomplete)"
        )
    unknown = sorted(name for name in stored if name not in recorded)
    if unknown:
        raise ActLoadError(
            f"{where}: {unknown[0]} has tensors, expected an entry of it in adapted_modules too ({len(unknown)} of "
            f"{len(stored)} modules have none; adapter_config.json does not belong to the tensors)"
        )
