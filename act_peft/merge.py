"""Merge ACT adapters into a full checkpoint on disk, at about the cost of copying it.

Every file of the base is mapped and written once, from beginning to end, with changed rows between the unchanged ones.
No model is built, and only some megabytes are in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from act_peft.adapter.file import AdapterFolder
from act_peft.channels.rows import ScaledDelta, merged_rows
from act_peft.combination.weighting import weighted_adapters
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import INDEX, Checkpoint, read_json, small_files
from act_peft.disk.folders import check_output, check_room, copy_file, file_in
from act_peft.disk.shard import Shard
from act_peft.disk.skeleton import load_config
from act_peft.disk.ties import without_ties
from act_peft.disk.writing import GatheringWriter, header_with
from act_peft.errors import ActWarning
from act_peft.merge_plan import Plan, Source, TensorMerge, compare_base, make_plan

_SMALL_ROW = 64  # bytes; a tensor with shorter rows, or with columns to change, is copied before it is written
_WORKERS = 2  # parts at a time; more would only wait for the same disk
_PART = 64 << 20  # bytes
_SLACK = 1 << 20  # bytes that stay free on the disk


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Merge ACT adapters into a checkpoint on disk, and write a full checkpoint that plain transformers loads.

        W[i, :] = round(W_base[i, :] + sum over adapters of weight * delta[i, :])          for their channels i

    The result equals, bit for bit, `merge_and_unload` of a model in the checkpoint's dtype with these adapters (and
    `set_scale(name, weight)`). The sum is computed in float32, in the sorted order of the adapters' names: the keys of
    `adapters`, or the last parts of their paths. Files without a change are copied byte for byte, and so are
    configuration, tokenizer, chat template, code and licence. The README, which describes the base, and pickled files
    are not copied. If the base ties its embeddings and one of them changes, the result has both tensors and
    `tie_word_embeddings: false`.

    Args:
        base: folder or Hub id of the base's checkpoint, in safetensors.
        adapters: folders or Hub ids of ACT adapters: one, several, or name -> folder.
        output_dir: the folder to write. It appears whole or not at all.
        weights: a factor for each adapter, in the order of `adapters` or by name; 1 by default.
        overwrite: replace an older checkpoint at `output_dir`.
        show_progress: show a progress bar over parts of files, if the error stream is a terminal.

    Raises:
        ActValueError: a missing or damaged checkpoint or adapter; no weight for an adapter; a quantized tensor that
            would change; no room on the disk; an output that exists or lies inside an input. Nothing is written then.
        ActLoadError: an adapter that does not fit the base.
        ActTypeError: a weight that is not a number.

    Warns:
        ActWarning: once for each adapter that was made for a base with other weights.

    Example:
        >>> merge_checkpoint(BASE, ["math", "code"], "merged", weights=[1.0, 0.5])
    """
    output = Path(os.path.abspath(output_dir))
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(base))
        sources = [
            Source(stack.enter_context(AdapterFolder(one.location)), one.weight)
            for one in sorted(weighted_adapters(adapters, weights), key=lambda one: one.name)
        ]
        check_output(output, [checkpoint.folder, *(s.adapter.folder for s in sources)], overwrite=overwrite)
        plan = make_plan(checkpoint, sources)
        small = small_files(checkpoint.folder)
        grown = [checkpoint.info(source) for source in plan.untied.values()]
        needed = sum(checkpoint.shard(file).size for file in checkpoint.files)
        needed += sum(file_in(checkpoint.folder, name).stat().st_size for name in small)
        check_room(output, needed + sum(info.stop - info.start for info in grown) + _SLACK)
        with new_folder(output, overwrite=overwrite) as folder:
            for name in small:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file_in(checkpoint.folder, name), folder / name)
            if plan.says_untied:
                _write_config(checkpoint, folder)
            if plan.untied:
                _write_index(checkpoint, plan, folder)
            with ThreadPoolExecutor(_WORKERS) as pool:
                jobs = list(_jobs(checkpoint, plan, folder))
                written = pool.map(lambda job: job(), jobs)
                hidden = None if show_progress else True
                for _ in tqdm(written, desc="merge", total=len(jobs), unit="part", disable=hidden):
                    pass  # an error ends the loop and cancels the jobs that have not started
            for source in sources:
                note = compare_base(checkpoint, source, plan)
                if note:
                    warnings.warn(note, ActWarning, stacklevel=2)


def _jobs(checkpoint: Checkpoint, plan: Plan, folder: Path) -> Iterator[Callable[[], None]]:
    """The work of writing, in parts of about the same size that may run at the same time."""
    for file in checkpoint.files:
        shard, target = checkpoint.shard(file), folder / file
        new = {key: source for key, source in plan.untied.items() if checkpoint.file_of(source) == file}
        changed = [key for key in plan.changes if key in checkpoint and checkpoint.file_of(key) == file]
        changed.sort(key=lambda key: shard.info(key).start)
        if not changed and not new:
            yield partial(copy_file, shard.path, target)
        elif new:  # the header is longer, so all tensors move
            yield partial(_write_grown, shard, plan, target, changed, new)
        else:
            with open(target, "xb") as empty:
                empty.truncate(shard.size)
            start, keys = 0, []
            for key in changed:
                keys.append(key)
                stop = shard.info(key).stop
                if stop - start >= _PART:
                    yield partial(_write_part, shard, plan, target, keys, start, stop)
                    start, keys = stop, []
            yield partial(_write_part, shard, plan, target, keys, start, shard.size)


def _write_part(shard: Shard, plan: Plan, target: Path, keys: Sequence[str], start: int, stop: int) -> None:
    """Write the bytes from `start` to `stop` of a file that already has its full size."""
    with GatheringWriter(target, start=start) as out:
        _write_range(out, shard, plan, keys, start, stop)


def _write_grown(shard: Shard, plan: Plan, target: Path, keys: Sequence[str], new: Mapping[str, str]) -> None:
    """Write a file with new tensors at its end."""
    with GatheringWriter(target) as out:
        out.write(header_with(shard, new))
        _write_range(out, shard, plan, keys, shard.data_start, shard.size)
        for key, source in new.items():
            _write_tensor(out, shard, source, plan.changes.get(key))


def _write_range(out: GatheringWriter, shard: Shard, plan: Plan, keys: Sequence[str], start: int, stop: int) -> None:
    """Write a range of a file: the tensors `keys` with their changes, and the bytes between them unchanged."""
    for key in keys:
        info = shard.info(key)
        _write_bytes(out, shard, start, info.start)
        _write_tensor(out, shard, key, plan.changes[key])
        start = info.stop
    _write_bytes(out, shard, start, stop)


def _write_bytes(out: GatheringWriter, shard: Shard, start: int, stop: int) -> None:
    for piece in shard.pieces(start, stop):
        out.write(piece)


def _write_tensor(out: GatheringWriter, shard: Shard, key: str, change: TensorMerge | None) -> None:
    """Write a tensor with its merged rows or columns, range by range along the first axis."""
    info = shard.info(key)
    for first, stop in info.blocks():
        block = shard.view(key, first, stop)
        block = block.flatten(1) if block.dim() > 2 else block  # a convolution of patches, linear in memory
        index = _channels_between(change, first, stop) if change is not None else None
        if change is None or index is None or not index.numel():
            out.write(block)
            continue
        local = index if change.dim == 1 else index - first
        original = block.index_select(change.dim, local)
        _note_seen(change, index, original)
        merged = merged_rows(original, index, _deltas_between(change, first, stop), dim=change.dim)
        if change.dim == 0 and info.row_bytes > _SMALL_ROW:
            out.write_with_rows(block, local, merged)
        else:
            out.write(block.index_copy(change.dim, local, merged))


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


def _write_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Say in the configuration that nothing is tied."""
    config = without_ties(read_json(checkpoint.folder, "config.json", finite=False), load_config(checkpoint))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Name the new tensors in the index, if there is one."""
    if not (folder / INDEX).is_file():
        return
    index = read_json(checkpoint.folder, INDEX)
    metadata = index.get("metadata")
    for new, source in plan.untied.items():
        info = checkpoint.info(source)
        index["weight_map"][new] = checkpoint.file_of(source)
        for name, more in (("total_size", info.stop - info.start), ("total_parameters", math.prod(info.shape))):
            if isinstance(metadata, dict) and isinstance(metadata.get(name), int):
                metadata[name] += more
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
