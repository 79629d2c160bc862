"""The folder of a saved ACT adapter, read without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.adapter.base_record import fingerprint, recorded_base
from act_peft.adapter.byproducts import ByProducts, sort_out
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import scaled_channels
from act_peft.disk.checkpoint import read_json
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.locations import Location, open_location
from act_peft.disk.shard import Shard
from act_peft.doors import OUTER
from act_peft.errors import ActLoadError, ActValueError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_ALL = slice(None)
_COMPARED = 4  # modules whose base rows are read to recognize a part of a checkpoint
_PARTS = ("act_delta_index", "act_delta_weight", "act_delta_bias", "act_delta_channel_scale")


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
        byproducts: what the file holds beside deltas.

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
        recorded = self.config.get("adapted_modules") or {}
        self._recorded: Mapping[str, Any] = recorded if isinstance(recorded, dict) else {}
        self.shard = Shard(place.file(TENSORS))
        try:
            self.modules = self._read_modules()
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

    def _read_modules(self) -> dict[str, StoredDelta]:
        parts: dict[str, dict[str, str]] = {}
        others = []
        for key in self.shard.tensors:
            module, _, part = key.removeprefix(OUTER).rpartition(".")
            if part in _PARTS and module and key.startswith(OUTER):
                parts.setdefault(module, {})[part] = key
            else:
                others.append(key)
        self.byproducts: ByProducts = sort_out(self.location, self.shard, others, self.config)
        return {module: self._read_module(module, keys) for module, keys in parts.items()}

    def _read_module(self, module: str, keys: Mapping[str, str]) -> StoredDelta:
        where = f"{self.location}: {module}"
        missing = [part for part in _PARTS[:2] if part not in keys]
        if missing:
            raise ActLoadError(f"{where}: the adapter has no {missing[0]}, expected one (the file is incomplete)")
        info = self.shard.info(keys["act_delta_index"])
        if info.dtype != "I64" or len(info.shape) != 1:
            raise ActLoadError(
                f"{where}: channel indices are {info.dtype} of shape {list(info.shape)}, expected I64 of shape [K]"
            )
        index = self.shard.tensor(keys["act_delta_index"])
        if index.numel() and (int(index[0]) < 0 or not bool((index[1:] > index[:-1]).all())):
            raise ActLoadError(
                f"{where}: channel indices from {int(index.min())} to {int(index.max())}, expected ascending ones "
                "from 0 on without repetition (the file is damaged)"
            )
        weight = self.shard.info(keys["act_delta_weight"])
        bias = self.shard.info(keys["act_delta_bias"]) if "act_delta_bias" in keys else None
        for part, tensor in (("act_delta_weight", weight), ("act_delta_bias", bias)):
            if tensor is not None and not tensor.is_plain:
                raise ActLoadError(f"{where}: {part} is {tensor.dtype}, expected a floating point dtype")
        if bias is not None and bias.shape != tuple(index.shape):
            raise ActLoadError(f"{where}: act_delta_bias has {list(bias.shape)}, expected {list(index.shape)}")
        scales = (
            self._read_scales(where, keys["act_delta_channel_scale"], index)
            if "act_delta_channel_scale" in keys
            else None
        )
        return StoredDelta(index, keys["act_delta_weight"], weight.shape, keys.get("act_delta_bias"), scales)

    def _read_scales(self, where: str, key: str, index: torch.Tensor) -> torch.Tensor:
        info = self.shard.info(key)
        if not info.is_plain or info.shape != tuple(index.shape):
            raise ActLoadError(
                f"{where}: act_delta_channel_scale is {info.dtype} {list(info.shape)}, expected floating point "
                f"numbers of shape {list(index.shape)}"
            )
        return self.shard.tensor(key)
