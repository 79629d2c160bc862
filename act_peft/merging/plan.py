"""What merging on disk is going to do, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from act_peft.adapter.base_record import Fingerprint
from act_peft.adapter.byproducts import TokenRows
from act_peft.adapter.file import AdapterFolder
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.shard import DTYPES, Shard, TensorInfo


@dataclass(frozen=True)
class Source:
    """An adapter and its weight."""

    adapter: AdapterFolder
    weight: float


@dataclass(frozen=True)
class Part:
    """The delta that one adapter adds to one tensor.

    Attributes:
        source: the adapter.
        module: the module in it.
        index: the rows or columns of the tensor, int64 `[K]`, ascending.
        key: of the delta in the adapter's file.
        order: which entry of the delta each of them gets; None if they are in the same order.
        seen: fingerprint of the rows that are read there.
    """

    source: Source
    module: str
    index: torch.Tensor
    key: str
    order: torch.Tensor | None = None
    seen: Fingerprint | None = None


@dataclass(frozen=True)
class TensorMerge:
    """All deltas of one tensor.

    Attributes:
        dim: axis of the channels.
        index: union of the parts' indices.
        parts: the deltas.
    """

    dim: int
    index: torch.Tensor
    parts: list[Part]


@dataclass(frozen=True)
class Start:
    """The values that a tensor has before any change: a tensor of the checkpoint, or of an adapter's file."""

    shard: Shard
    key: str


@dataclass(frozen=True)
class NewRows:
    """Rows of a tensor that an adapter replaces."""

    source: Source
    module: str
    tokens: TokenRows


@dataclass(frozen=True)
class Plan:
    """What changes in a checkpoint.

    Attributes:
        checkpoint: the base.
        keys: the keys of its parameters.
        changes: key to write -> its deltas.
        rows: key to write -> rows that are replaced.
        starts: key to write -> what it starts as, where that is not the checkpoint's tensor of this key.
        untied: key of a new tensor -> key of the tensor whose place and dtype it takes.
        config: what `config.json` has to say; None if it stays as it is.
        compared: adapter, module and axis, with the fingerprint of the rows if merging reads them in one go.
        overflows: modules whose merged values are not all finite; filled while writing.
    """

    checkpoint: Checkpoint
    keys: CheckpointKeys
    changes: dict[str, TensorMerge] = field(default_factory=dict)
    rows: dict[str, list[NewRows]] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    compared: list[tuple[Source, str, int, Fingerprint | None]] = field(default_factory=list)
    overflows: dict[str, None] = field(default_factory=dict)

    def file_of(self, key: str) -> str:
        """The file that a tensor is written to."""
        return self.checkpoint.file_of(self.untied.get(key, key))

    def start(self, key: str) -> Start:
        """What a tensor starts as."""
        if key in self.starts:
            return self.starts[key]
        return Start(self.checkpoint.shard(self.file_of(key)), self.untied.get(key, key))

    def info(self, key: str) -> TensorInfo:
        """Dtype, shape and size of a tensor as it is written."""
        info = self.checkpoint.info(self.untied.get(key, key))
        if key not in self.starts:
            return info
        shape = self.starts[key].shard.shape(self.starts[key].key)
        if math.prod(shape) == math.prod(info.shape):
            return info  # a convolution of patches is a linear layer in memory
        return replace(info, shape=shape, start=0, stop=math.prod(shape) * DTYPES[info.dtype].itemsize)

    @property
    def touched(self) -> Collection[str]:
        """The keys of all tensors that are not copied as they are."""
        return dict.fromkeys([*self.changes, *self.rows, *self.starts, *self.untied])

    def new_sizes(self) -> Mapping[str, TensorInfo]:
        """The tensors that are new or of another size than in the checkpoint."""
        infos = {key: self.info(key) for key in self.touched}
        return {
            key: info for key, info in infos.items() if key in self.untied or info.shape != self.checkpoint.shape(key)
        }

    def adapters_of(self, key: str) -> Sequence[str]:
        """The places of the adapters that change a tensor."""
        parts = self.changes[key].parts if key in self.changes else []
        return [part.source.adapter.location for part in parts]
