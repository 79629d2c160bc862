"""The folder of a saved ACT adapter, read without a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from act_peft.adapter.base_record import fingerprint, recorded_base
from act_peft.adapter.byproducts import ByProducts, sort_out
from act_peft.adapter.config import ActConfig, config_from
from act_peft.adapter.stored import PARTS, read_deltas
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import scaled_channels
from act_peft.disk.checkpoint import read_json
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.locations import Location, open_location
from act_peft.disk.shard import Shard
from act_peft.doors import OUTER
from act_peft.errors import ActValueError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_ALL = slice(None)
_COMPARED = 4  # modules whose base rows are read to recognize a part of a checkpoint


class AdapterFolder:
    """A saved ACT adapter, open for reading; a context manager.

    Args:
        location: a folder or Hub id, or one that is open already.

    Attributes:
        location: the folder or Hub id that the user gave.
        folder: the local folder.
        config: its configuration.
        modules: module name -> `StoredDelta`.
        byproducts: what the file holds beside deltas.

    Raises:
        ActValueError: if there is no such adapter, a file is damaged, or it is an adapter of a different method.
        ActLoadError: if it holds tensors that no ACT adapter has.
    """

    def __init__(self, location: str | os.PathLike[str] | Location) -> None:
        place = open_location(location, expected=f"an adapter ({CONFIG})", files=[CONFIG, TENSORS])
        self.location, self.folder = place.name, place.folder
        content = read_json(self.folder, CONFIG)
        if content.get("peft_type") != "ACT":
            raise ActValueError(
                f"{self.location}: got an adapter of type {str(content.get('peft_type'))[:40]}, expected ACT "
                "(use PEFT for adapters of other methods)"
            )
        self.config: ActConfig = config_from(content, f"{self.folder / CONFIG}")
        self._recorded = self.config.adapted_modules or {}
        self.shard = Shard(place.file(TENSORS))
        try:
            others = [key for key in self.shard.tensors if not _is_delta(key)]
            self.byproducts: ByProducts = sort_out(self.location, self.shard, others, content)
            has_scales = self.config.trains.has_scales
            self.modules = read_deltas(self.shard, self.location, recorded=self._recorded, has_scales=has_scales)
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
        kinds = {kind.value: kind for kind in ChannelKind}
        kind = kinds.get(self._recorded.get(module, {}).get("kind", ""))
        return None if kind is None else kind.channel_dim

    def fits(self, parameter: str, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape can be one that the adapter was made for, as far as the adapter knows."""
        module, _, part = parameter.rpartition(".")
        delta = self.modules.get(module)
        if delta is None or part != "weight":
            return True
        channels = self._recorded.get(module, {}).get("channels")
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


def _is_delta(key: str) -> bool:
    """Whether a tensor's name is that of a channel delta of a module."""
    module, _, part = key.removeprefix(OUTER).rpartition(".")
    return part in PARTS and bool(module) and key.startswith(OUTER)
