"""The folder of a saved ACT adapter, read without a model."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.adapter.base_record import fingerprint, recorded_base
from act_peft.adapter.state import ANY, BIAS, INDEX, SCALES, SELECTED, WEIGHT, ExpectedState, check_state
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import scaled_channels
from act_peft.disk.checkpoint import read_json
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.locations import Location, open_location
from act_peft.disk.shard import DTYPES, Shard
from act_peft.doors import COMPILED, OUTER
from act_peft.errors import ActLoadError, ActValueError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_ALL = slice(None)
_PARTS = (INDEX, WEIGHT, BIAS, SCALES)
_TRAINED_SCALES = ("scales", "both")
_COMPARED = 4  # modules whose base rows are read to recognize a part of a checkpoint


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


class AdapterFolder:
    """A saved ACT adapter, open for reading; a context manager.

    Args:
        location: a folder or Hub id, or one that is open already.

    Attributes:
        location: the folder or Hub id that the user gave.
        folder: the local folder.
        config: the content of `adapter_config.json`.
        modules: module name -> `StoredDelta`.

    Raises:
        ActValueError: if there is no such adapter, a file is damaged, or it is an adapter of a different method.
        ActLoadError: if it holds tensors that no ACT adapter has.
    """

    def __init__(self, location: str | os.PathLike[str] | Location) -> None:
        place = open_location(location, expected=f"an adapter ({CONFIG})", files=[CONFIG, TENSORS])
        self.location, self.folder = place.name, place.folder
        self.config = read_json(self.folder, CONFIG)
        if self.config.get("peft_type") != "ACT":
            raise ActValueError(
                f"{self.location}: got an adapter of type {str(self.config.get('peft_type'))[:40]}, expected ACT "
                "(merge other adapters with PEFT)"
            )
        self._recorded = _record_of(self.config)
        self.shard = Shard(place.file(TENSORS))
        try:
            _check_parts(self.location, self.shard)
            self.modules = read_deltas(self.shard, self.config, self.location)
        except BaseException:
            self.shard.close()
            raise

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self.shard.close()

    def __enter__(self) -> AdapterFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def recorded_base(self, module: str) -> str | None:
        """The recorded fingerprint of the base rows of a module; None if there is none."""
        return recorded_base(self._recorded, module)

    def recorded_axis(self, module: str) -> int | None:
        """The axis of a module's channels, by its recorded kind; None if there is none."""
        entry = self._recorded.get(module)
        kinds = {kind.value: kind for kind in ChannelKind}
        kind = kinds.get(str(entry.get("kind"))) if isinstance(entry, dict) else None
        return None if kind is None else kind.channel_dim

    def fits(self, parameter: str, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape can be one that the adapter was made for, as far as the adapter knows."""
        module, _, part = parameter.rpartition(".")
        delta = self.modules.get(module)
        if delta is None or part != "weight":
            return True
        entry = self._recorded.get(module)
        channels = entry.get("channels") if isinstance(entry, dict) else None
        return any(
            delta.weight_shape == (*shape[:dim], delta.index.numel(), *shape[dim + 1 :])
            and channels in (None, shape[dim])
            for dim in range(len(shape))
        )

    def recognize(self, keys: CheckpointKeys) -> int:
        """How many of some modules have base rows in a checkpoint that give their recorded fingerprints."""
        known = [name for name in self.modules if self.recorded_base(name) and keys.holds(f"{name}.weight")]
        known.sort(key=lambda name: self.modules[name].index.numel())
        return sum(self._recognizes(keys, name) for name in known[:_COMPARED])

    def _recognizes(self, keys: CheckpointKeys, module: str) -> bool:
        index, dim = self.modules[module].index, self.recorded_axis(module) or 0
        shape = keys.shape(f"{module}.weight")
        if not index.numel() or not self.fits(f"{module}.weight", shape) or int(index[-1]) >= shape[dim]:
            return False
        has_bias = self.modules[module].bias is not None and keys.holds(f"{module}.bias")
        bias = keys.rows(f"{module}.bias", index) if has_bias else None
        return fingerprint(keys.rows(f"{module}.weight", index, dim), bias) == self.recorded_base(module)

    def scaled(self, module: str, rows: torch.Tensor, dim: int, channels: slice | torch.Tensor = _ALL) -> torch.Tensor:
        """Rows of an adapter times the learned scales of their channels; unchanged if the adapter has no scales.

        Args:
            module: name of the module.
            rows: rows of its `act_delta_weight` or `act_delta_bias`, channels along `dim`.
            dim: axis of the channels.
            channels: positions of the rows among the selected channels, a slice or int64 `[n]`; all by default.
        """
        scales = self.modules[module].scales
        return rows if scales is None else scaled_channels(rows, scales[channels], dim)


def read_deltas(shard: Shard, config: Mapping[str, Any], where: str) -> dict[str, StoredDelta]:
    """The channel deltas in a file, checked as far as the file and its configuration alone can tell.

    Tensors of modules that the adapter saves as a whole, and of tokens, are not looked at.

    Args:
        shard: the file.
        config: the content of `adapter_config.json`; empty if it is not known.
        where: the adapter, for messages.

    Raises:
        ActLoadError: a tensor that is missing, has a wrong dtype or shape, or contradicts the record of its module;
            indices that are not ascending, not unique or out of range; modules that the record does not have, or
            that only the record has.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in shard.tensors:
        module, _, part = key.removeprefix(OUTER).rpartition(".")
        if part in _PARTS:
            parts.setdefault(module, {})[part] = key
    recorded = {name.removeprefix(COMPILED): entry for name, entry in _record_of(config).items()}
    if recorded:
        _check_same_modules(where, recorded, {name.removeprefix(COMPILED) for name in parts})
    deltas = {}
    for module, keys in parts.items():
        entry = recorded.get(module.removeprefix(COMPILED))
        state = {part: _looked_at(shard, part, key) for part, key in keys.items()}
        expected = _expected(entry if isinstance(entry, Mapping) else {}, config.get("trainable"))
        check_state(expected, state, f"{where}: {module}")
        deltas[module] = StoredDelta(
            state[INDEX], keys[WEIGHT], tuple(state[WEIGHT].shape), keys.get(BIAS), state.get(SCALES)
        )
    return deltas


def _record_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    recorded = config.get("adapted_modules")
    return recorded if isinstance(recorded, Mapping) else {}


def _looked_at(shard: Shard, part: str, key: str) -> torch.Tensor:
    """Indices and scales with their values; of other tensors only dtype and shape."""
    info = shard.info(key)
    small = {INDEX: info.dtype == "I64" and len(info.shape) == 1, SCALES: info.is_plain and len(info.shape) == 1}
    if small.get(part):
        return shard.tensor(key)
    return torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.uint8), device="meta")


def _expected(entry: Mapping[str, Any], trainable: Any) -> ExpectedState:
    """What the record of a module says about its tensors. Adapters of version 0.1 record less."""
    kinds = {kind.value: kind for kind in ChannelKind}
    kind = kinds.get(str(entry.get("kind")))
    weights = {
        (SELECTED,) if known.is_norm else (SELECTED, ANY) if known.channel_dim == 0 else (ANY, SELECTED)
        for known in (kinds.values() if kind is None else [kind])
    }
    scales = trainable in _TRAINED_SCALES
    return ExpectedState(
        num_channels=_count(entry, "channels"),
        num_selected=_count(entry, "selected"),
        shapes={
            WEIGHT: sorted(weights, key=str),
            BIAS: [(SELECTED,)],
            **({SCALES: [(SELECTED,)]} if scales or trainable is None else {}),
        },
        optional=frozenset({BIAS} if scales else {BIAS, SCALES}),
    )


def _count(entry: Mapping[str, Any], name: str) -> int | None:
    value = entry.get(name)
    return value if type(value) is int else None


def _check_same_modules(where: str, recorded: Mapping[str, Any], stored: Collection[str]) -> None:
    lost = [name for name, entry in recorded.items() if name not in stored and _count(entry, "selected") != 0]
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


def _check_parts(where: str, shard: Shard) -> None:
    """Check that an adapter holds channel deltas only."""
    for key in shard.tensors:
        module, _, part = key.removeprefix(OUTER).rpartition(".")
        if part not in _PARTS or not module or not key.startswith(OUTER):
            raise ActLoadError(
                f"{where}: {key}: got a tensor that is no channel delta, expected only {', '.join(_PARTS)} "
                "(modules_to_save and trainable tokens have to be merged in memory, with model.merge_and_unload())"
            )
