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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from act_peft.adapter.base_record import BaseComparison, Fingerprint
from act_peft.adapter.file import AdapterFolder, StoredDelta
from act_peft.channels.rows import ScaledDelta, merged_rows
from act_peft.combination.weighting import weighted_adapters
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import INDEX, Checkpoint, read_json, small_files
from act_peft.disk.folders import check_output, check_room, copy_file, file_in
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.shard import Shard
from act_peft.disk.writing import GatheringWriter, header_with
from act_peft.errors import ActLoadError, ActValueError, ActWarning

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
        ActWarning: once for each adapter that was made for a base with different weights.

    Example:
        >>> merge_checkpoint(BASE, ["math", "code"], "merged", weights=[1.0, 0.5])
    """
    output = Path(os.path.abspath(output_dir))
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(base))
        sources = [
            _Source(stack.enter_context(AdapterFolder(one.location)), one.weight)
            for one in sorted(weighted_adapters(adapters, weights), key=lambda one: one.name)
        ]
        check_output(output, [checkpoint.folder, *(s.adapter.folder for s in sources)], overwrite=overwrite)
        plan = _make_plan(checkpoint, sources)
        small = small_files(checkpoint.folder)
        grown = [checkpoint.info(source) for source in plan.untied.values()]
        needed = sum(checkpoint.shard(file).size for file in checkpoint.files)
        needed += sum(file_in(checkpoint.folder, name).stat().st_size for name in small)
        check_room(output, needed + sum(info.stop - info.start for info in grown) + _SLACK)
        with new_folder(output) as folder:
            for name in small:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file_in(checkpoint.folder, name), folder / name)
            if plan.untied:
                _write_untied(checkpoint, plan, folder)
            with ThreadPoolExecutor(_WORKERS) as pool:
                jobs = list(_jobs(checkpoint, plan, folder))
                written = pool.map(lambda job: job(), jobs)
                hidden = None if show_progress else True
                for _ in tqdm(written, desc="merge", total=len(jobs), unit="part", disable=hidden):
                    pass  # an error ends the loop and cancels the jobs that have not started
            for source in sources:
                note = _compare_base(checkpoint, source, plan)
                if note:
                    warnings.warn(note, ActWarning, stacklevel=2)


# ------------------------------------------------------------------------------------------------------- planning ---


@dataclass(frozen=True)
class _Source:
    adapter: AdapterFolder
    weight: float


@dataclass(frozen=True)
class _Part:
    """The delta that one adapter adds to one tensor."""

    source: _Source
    module: str
    index: torch.Tensor
    key: str
    seen: Fingerprint | None = None


@dataclass(frozen=True)
class _TensorMerge:
    """All deltas of one tensor: `original` is the key to read, `index` the union of the parts' channels."""

    original: str
    dim: int
    index: torch.Tensor
    parts: list[_Part]


@dataclass(frozen=True)
class _Plan:
    """Key to write -> its change; new key -> key of the tied tensor; module -> keys of weight and bias."""

    changes: dict[str, _TensorMerge] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    modules: dict[str, tuple[str, str | None]] = field(default_factory=dict)


def _make_plan(checkpoint: Checkpoint, sources: Sequence[_Source]) -> _Plan:
    """Find the tensor of every adapted module, and check that the deltas fit."""
    modules = {module: None for source in sources for module in source.adapter.modules}
    names = [f"{module}.weight" for module in modules]
    keys = CheckpointKeys(checkpoint, names)
    plan = _Plan(untied=keys.untied_by([*names, *(f"{module}.bias" for module in modules)]))
    for module in modules:
        written = keys.own_key(f"{module}.weight")
        original = keys.key(f"{module}.weight") or written
        parts = [(s, s.adapter.modules[module]) for s in sources if module in s.adapter.modules]
        dim = _check_parts(checkpoint, module, original, parts)
        index = torch.cat([delta.index for _, delta in parts]).unique()  # sorted
        plan.changes[written] = _TensorMerge(original, dim, index, [_weight_part(s, d, module) for s, d in parts])
        bias = keys.key(f"{module}.bias")
        _check_bias(checkpoint, module, bias, parts)
        if bias is not None:
            biases = [_Part(s, module, d.index, d.bias) for s, d in parts if d.bias]
            plan.changes[keys.own_key(f"{module}.bias")] = _TensorMerge(bias, 0, index, biases)
        plan.modules[module] = (written, bias)
    return plan


def _weight_part(source: _Source, delta: StoredDelta, module: str) -> _Part:
    recorded = source.adapter.recorded_base(module)
    return _Part(source, module, delta.index, delta.weight, None if recorded is None else Fingerprint())


def _check_parts(checkpoint: Checkpoint, module: str, key: str, parts: Sequence[tuple[_Source, StoredDelta]]) -> int:
    """Check the deltas of one module's weight; the axis of the channels follows from the shapes."""
    info = checkpoint.info(key)
    if not info.is_plain:
        raise ActValueError(
            f"{module}: {key} is {info.dtype}, expected F64, F32, F16 or BF16 (the base is quantized: merge into the "
            "original checkpoint, then quantize)"
        )
    axes = {0, 1}
    for source, delta in parts:
        fitting = {
            dim
            for dim in range(min(len(info.shape), 2))
            if delta.weight_shape == (*info.shape[:dim], delta.index.numel(), *info.shape[dim + 1 :])
        }
        if not fitting:
            raise ActLoadError(
                f"{module}: size mismatch: {source.adapter.location} has deltas {list(delta.weight_shape)} for "
                f"{delta.index.numel()} channels, the base has weight {list(info.shape)} (the adapter was made for "
                "another model)"
            )
        axes &= fitting
    dim = min(axes, default=0)
    if len(axes) > 1:  # all channels of a square weight: the axis matters only for learned scales
        recorded = [source.adapter.recorded_axis(module) for source, delta in parts if delta.scales is not None]
        known = {axis for axis in recorded if axis is not None}
        if len(known) > 1 or None in recorded:
            raise ActLoadError(
                f"{module}: all channels of a square weight have learned scales, expected adapted_modules to say its "
                "kind (adapter_config.json is damaged)"
            )
        dim = min(known, default=dim)
    for source, delta in parts:
        if delta.index.numel() and int(delta.index[-1]) >= info.shape[dim]:
            raise ActLoadError(
                f"{module}: {source.adapter.location} selects channel {int(delta.index[-1])}, the base has "
                f"{info.shape[dim]} (the adapter was made for another model)"
            )
    return dim


def _check_bias(
    checkpoint: Checkpoint, module: str, key: str | None, parts: Sequence[tuple[_Source, StoredDelta]]
) -> None:
    for source, delta in parts:
        if (key is None) != (delta.bias is None):
            words = ("deltas", "none") if key is None else ("no deltas", "one")
            raise ActLoadError(
                f"{module}: {source.adapter.location} has {words[0]} for the bias, the base has {words[1]} (the "
                "adapter was made for another model)"
            )
    if key is not None and not checkpoint.info(key).is_plain:
        raise ActValueError(f"{module}: {key} is {checkpoint.info(key).dtype}, expected F64, F32, F16 or BF16")
    selected = max((int(delta.index[-1]) for _, delta in parts if delta.index.numel()), default=-1)
    if key is not None and selected >= math.prod(checkpoint.shape(key)):
        raise ActLoadError(f"{module}: {key} has shape {list(checkpoint.shape(key))}, fewer channels than the weight")


def _compare_base(checkpoint: Checkpoint, source: _Source, plan: _Plan) -> str | None:
    """Compare the base rows, hashed when they were read, with those that an adapter was made for."""
    comparison = BaseComparison(source.adapter.location, checkpoint.location)
    for module, (weight, bias) in plan.modules.items():
        for part in plan.changes[weight].parts:
            if part.source is source and part.seen is not None:
                if bias is not None:
                    part.seen.add(checkpoint.rows(bias, part.index))
                comparison.add_(module, source.adapter.recorded_base(module), part.seen.result)
    note = comparison.note()
    home = source.adapter.config.get("base_model_name_or_path") or "the base that it was trained on"
    return None if note is None else f"{note} (merge it into {home})"


# -------------------------------------------------------------------------------------------------------- writing ---


def _jobs(checkpoint: Checkpoint, plan: _Plan, folder: Path) -> Iterator[Callable[[], None]]:
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


def _write_part(shard: Shard, plan: _Plan, target: Path, keys: Sequence[str], start: int, stop: int) -> None:
    """Write the bytes from `start` to `stop` of a file that already has its full size."""
    with GatheringWriter(target, start=start) as out:
        _write_range(out, shard, plan, keys, start, stop)


def _write_grown(shard: Shard, plan: _Plan, target: Path, keys: Sequence[str], new: Mapping[str, str]) -> None:
    """Write a file with new tensors at its end."""
    with GatheringWriter(target) as out:
        out.write(header_with(shard, new))
        _write_range(out, shard, plan, keys, shard.data_start, shard.size)
        for key, source in new.items():
            _write_tensor(out, shard, source, plan.changes.get(key))


def _write_range(out: GatheringWriter, shard: Shard, plan: _Plan, keys: Sequence[str], start: int, stop: int) -> None:
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


def _write_tensor(out: GatheringWriter, shard: Shard, key: str, change: _TensorMerge | None) -> None:
    """Write a tensor with its merged rows or columns, range by range along the first axis."""
    info = shard.info(key)
    for first, stop in info.blocks():
        block = shard.view(key, first, stop)
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


def _channels_between(change: _TensorMerge, first: int, stop: int) -> torch.Tensor:
    """The channels in a range of the first axis."""
    if change.dim == 1:
        return change.index
    i, j = torch.searchsorted(change.index, torch.tensor([first, stop])).tolist()
    return change.index[i:j]


def _note_seen(change: _TensorMerge, index: torch.Tensor, original: torch.Tensor) -> None:
    """Add base rows, those of the channels `index`, to the fingerprints of the adapters that change them."""
    for part in change.parts:
        if part.seen is None:
            continue
        if part.index.numel() == change.index.numel():
            part.seen.add(original)
        else:
            part.seen.add(original.index_select(change.dim, torch.isin(index, part.index).nonzero().squeeze(1)))


def _deltas_between(change: _TensorMerge, first: int, stop: int) -> Iterator[ScaledDelta]:
    """The channels and deltas of each adapter between two positions of the first axis."""
    for part in change.parts:
        adapter = part.source.adapter
        channels, entries = slice(None), slice(first, stop)
        if change.dim == 0:
            i, j = torch.searchsorted(part.index, torch.tensor([first, stop])).tolist()
            channels = entries = slice(i, j)
        rows = adapter.shard.view(part.key, entries.start, entries.stop)
        yield part.index[channels], adapter.scaled(part.module, rows, change.dim, channels), part.source.weight


def _write_untied(checkpoint: Checkpoint, plan: _Plan, folder: Path) -> None:
    """Write to the configuration and the index that the weights are separate tensors now."""
    config = read_json(checkpoint.folder, "config.json")
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
