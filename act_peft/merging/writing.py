"""Writing a merged checkpoint: every file from beginning to end, with changed tensors between the unchanged bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from act_peft.channels.rows import ScaledDelta, all_finite, merged_rows, wide_dtype
from act_peft.disk.folders import copy_file
from act_peft.disk.shard import DTYPES, Shard
from act_peft.disk.writing import GatheringWriter, header_with
from act_peft.errors import ActValueError
from act_peft.merging.plan import NewRows, Plan, TensorMerge

_SMALL_ROW = 64  # bytes; a tensor with shorter rows, or with columns to change, is copied before it is written
_PART = 64 << 20  # bytes


def writing_jobs(plan: Plan, folder: Path, *, safe_merge: bool) -> Iterator[Callable[[], None]]:
    """The work of writing all files, in parts of about the same size that may run at the same time.

    Args:
        plan: what changes.
        folder: where the files are written.
        safe_merge: whether merged values that are not finite are an error.

    Raises:
        ActValueError: by the jobs: deltas or new values that are not finite; with `safe_merge`, merged values too.
    """
    sizes = plan.new_sizes()
    for file in plan.checkpoint.files:
        shard, target = plan.checkpoint.shard(file), folder / file
        touched = [key for key in plan.touched if plan.file_of(key) == file]
        writing = _Writing(plan, shard, target, safe_merge)
        if not touched:
            yield partial(copy_file, shard.path, target)
        elif not sizes.keys().isdisjoint(touched):  # tensors are new or have other sizes, so all of them move
            yield writing.write_anew
        else:
            with open(target, "xb") as empty:
                empty.truncate(shard.size)
            start, keys = 0, []
            for key in sorted(touched, key=lambda key: shard.info(key).start):
                keys.append(key)
                stop = shard.info(key).stop
                if stop - start >= _PART:
                    yield partial(writing.write_part, keys, start, stop)
                    start, keys = stop, []
            yield partial(writing.write_part, keys, start, shard.size)


@dataclass(frozen=True)
class _Writing:
    """The writing of one file."""

    plan: Plan
    shard: Shard
    target: Path
    safe_merge: bool

    def write_part(self, keys: Sequence[str], start: int, stop: int) -> None:
        """Write the bytes from `start` to `stop` of a file that already has its full size, with changed tensors."""
        with GatheringWriter(self.target, start=start) as out:
            for key in keys:
                info = self.shard.info(key)
                self._write_bytes(out, start, info.start)
                self._write_tensor(out, key)
                start = info.stop
            self._write_bytes(out, start, stop)

    def write_anew(self) -> None:
        """Write a file in which tensors are new or have other sizes."""
        touched = self.plan.touched
        new = {k: info for k, info in self.plan.new_sizes().items() if self.plan.file_of(k) == self.shard.path.name}
        header, order = header_with(self.shard, new)
        with GatheringWriter(self.target) as out:
            out.write(header)
            for key in order:
                if key in touched:
                    self._write_tensor(out, key)
                else:
                    self._write_bytes(out, self.shard.info(key).start, self.shard.info(key).stop)

    def _write_bytes(self, out: GatheringWriter, start: int, stop: int) -> None:
        for piece in self.shard.pieces(start, stop):
            out.write(piece)

    def _write_tensor(self, out: GatheringWriter, key: str) -> None:
        """Write a tensor with its merged rows or columns, range by range along the first axis."""
        start, dtype = self.plan.start(key), DTYPES[self.plan.info(key).dtype]
        info = start.shard.info(start.key)
        change, rows = self.plan.changes.get(key), self.plan.rows.get(key, ())
        if not info.shape:
            self._check_new(key, start.shard.tensor(start.key))
            out.write(start.shard.tensor(start.key).to(dtype).reshape(1))
            return
        for first, stop in info.blocks():
            block = start.shard.view(start.key, first, stop)
            self._check_new(key, block)
            block = block.to(dtype)
            block = block.flatten(1) if block.dim() > 2 else block  # a convolution of patches, linear in memory
            for new in rows:
                block = _with_rows(block, new, first)
            index = _channels_between(change, first, stop) if change is not None else None
            if change is None or index is None or not index.numel():
                out.write(block)
                continue
            local = index if change.dim == 1 else index - first
            original = block.index_select(change.dim, local)
            _note_seen(change, index, original)
            merged = merged_rows(original, index, _deltas_between(change, first, stop), dim=change.dim)
            if not all_finite(merged):
                self._refuse_or_note(change, first, stop)
            if change.dim == 0 and info.row_bytes > _SMALL_ROW:
                out.write_with_rows(block, local, merged)
            else:
                out.write(block.index_copy(change.dim, local, merged))

    def _check_new(self, key: str, values: torch.Tensor) -> None:
        """Check values that an adapter brings."""
        start = self.plan.starts.get(key)
        if start is not None and not all_finite(values):
            raise ActValueError(
                f"{start.shard.path}: {start.key} holds NaN or infinity, expected finite numbers (the adapter is "
                "broken)"
            )

    def _refuse_or_note(self, change: TensorMerge, first: int, stop: int) -> None:
        """Say why merged values are not finite: a broken adapter is refused, a narrow dtype is noted."""
        deltas = _deltas_between(change, first, stop)
        for part, (_, delta, weight) in zip(change.parts, deltas, strict=True):
            if not all_finite(delta.to(wide_dtype(delta.dtype)) * weight):
                raise ActValueError(
                    f"{part.module}: the deltas of {part.source.adapter.location} times their weight {weight:g} hold "
                    "NaN or infinity, expected finite numbers (the adapter is broken, or the weight too large)"
                )
        module = change.parts[0].module
        if self.safe_merge:
            raise ActValueError(
                f"{module}: merged values are not finite in {self.shard.path.name}, expected finite numbers (the sums "
                "are too large for the checkpoint's dtype, or its own values are not finite: use smaller weights, or "
                "leave safe_merge out)"
            )
        self.plan.overflows[module] = None


def _with_rows(block: torch.Tensor, new: NewRows, first: int) -> torch.Tensor:
    """A block of rows from `first` on, with the new rows of tokens in it."""
    tokens = new.tokens
    i, j = torch.searchsorted(tokens.index, torch.tensor([first, first + len(block)])).tolist()
    if i == j:
        return block
    rows = new.source.adapter.shard.tensor(tokens.key)[tokens.order[i:j]]
    if not all_finite(rows):
        raise ActValueError(
            f"{new.module}: the rows of tokens of {new.source.adapter.location} hold NaN or infinity, expected finite "
            "numbers (the adapter is broken)"
        )
    return block.index_copy(0, tokens.index[i:j] - first, rows.to(block.dtype))


def _channels_between(change: TensorMerge, first: int, stop: int) -> torch.Tensor:
    """The channels in a range of the first axis."""
    if change.dim == 1:
        return change.index
    i, j = torch.searchsorted(change.index, torch.tensor([first, stop])).tolist()
    return change.index[i:j]


def _note_seen(change: TensorMerge, index: torch.Tensor, original: torch.Tensor) -> None:
    """Add base rows, those of the channels `index`, to the fingerprints of the adapters that change them."""
    for part in change.parts:
        if part.seen is None:
            continue
        if part.index.numel() == change.index.numel():
            part.seen.add(original)
        else:
            part.seen.add(original.index_select(change.dim, torch.isin(index, part.index).nonzero().squeeze(1)))


def _deltas_between(change: TensorMerge, first: int, stop: int) -> Iterator[ScaledDelta]:
    """The channels and deltas of each adapter between two positions of the first axis."""
    for part in change.parts:
        adapter = part.source.adapter
        channels, entries = slice(None), slice(first, stop)
        if change.dim == 0:
            i, j = torch.searchsorted(part.index, torch.tensor([first, stop])).tolist()
            channels = entries = slice(i, j)
        if part.order is None:
            rows = adapter.shard.view(part.key, entries.start, entries.stop)
            scaled = adapter.scaled(part.module, rows, change.dim, channels)
        else:
            taken = part.order[channels]
            rows = adapter.shard.view(part.key, 0, adapter.modules[part.module].index.numel())[taken]
            scaled = adapter.scaled(part.module, rows, change.dim, taken)
        yield part.index[channels], scaled, part.source.weight
