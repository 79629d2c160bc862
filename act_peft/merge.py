"""Merging on disk: ACT adapters into a full checkpoint, at about the cost of copying it.

The files of the base are copied as they are, then the changed rows are written into the copies in place. No model is
built, and no more than some megabytes of it are in memory.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from act_peft.adapterfile import AdapterFolder, ModuleDelta
from act_peft.arithmetic import ScaledDelta, merged_rows
from act_peft.checkpoint import INDEX, SMALL_FILES, Checkpoint, read_json
from act_peft.errors import ActLoadError, ActTypeError, ActValueError, ActWarning
from act_peft.fingerprint import Fingerprint
from act_peft.folders import check_output, check_room, copy_file, file_in, new_folder
from act_peft.names import key_for, prefix_change
from act_peft.shards import TensorInfo, header_with, write_block, write_rows
from act_peft.skeleton import load_config, tied_weights

_LEFT_OUT = ("*.index.json", "trainer_state.json", "adapter_config.json", "all_results.json", "*_results.json")
_TEMPLATES = "additional_chat_templates"
_SMALL_ROW = 64  # bytes; a tensor with shorter rows is rewritten as a whole, as are columns
_COPIES = 1
_SLACK = 1 << 20  # bytes kept free beyond what is written


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> None:
    """Merge ACT adapters into a checkpoint on disk and write a full one that plain transformers loads.

        W[i, :] = round(W_base[i, :] + sum over adapters of weight * delta[i, :])          for their channels i

    The same numbers, bit for bit, as `merge_and_unload` of a model in the checkpoint's dtype with these adapters (and
    `set_scale(name, weight)`). The sum is in float32, in the sorted order of the adapters' names: the keys of
    `adapters`, else the last parts of their paths. Files in which nothing changes are copied byte for byte, and so
    are configuration, tokenizer, chat template, code and licence; not the README, which describes the base, and
    nothing pickled. If the base ties its embeddings and one of them changes, the result has both
    and `tie_word_embeddings: false`.

    Args:
        base: folder or Hub id of the base's checkpoint, in safetensors.
        adapters: folders or Hub ids of ACT adapters: one, several, or name -> folder.
        output_dir: the folder to write. It appears whole or not at all.
        weights: a factor for each adapter, in the order of `adapters` or by name; 1 by default.
        overwrite: whether an older checkpoint at `output_dir` is replaced.

    Raises:
        ActValueError: no or damaged checkpoint or adapter, no weight for an adapter, a quantised tensor to change, no
            room on the disk, an output that exists or lies inside an input. Nothing is written then.
        ActLoadError: an adapter that does not fit the base.
        ActTypeError: a weight that is no number.

    Warns:
        ActWarning: once for each adapter that was made for a base with other weights.
    """
    output = Path(os.path.abspath(output_dir))
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(base))
        sources = [
            _Source(stack.enter_context(AdapterFolder(location)), weight)
            for location, weight in _ordered(adapters, weights)
        ]
        check_output(output, [checkpoint.folder, *(s.adapter.folder for s in sources)], overwrite=overwrite)
        plan = _make_plan(checkpoint, sources)
        small = _small_files(checkpoint.folder)
        grown = [checkpoint.info(source) for source in plan.untied.values()]
        needed = sum(checkpoint.shard(file).size for file in checkpoint.files)
        needed += sum(file_in(checkpoint.folder, name).stat().st_size for name in small)
        check_room(output, needed + sum(info.stop - info.start for info in grown) + _SLACK)
        # The kernel copies the next files while the rows of one are computed and written.
        with new_folder(output) as folder, ThreadPoolExecutor(_COPIES) as pool:
            copies = [pool.submit(_copy, checkpoint, plan, file, folder / file) for file in checkpoint.files]
            for name in small:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file_in(checkpoint.folder, name), folder / name)
            if plan.untied:
                _write_untied(checkpoint, plan, folder)
            for file, copied in zip(checkpoint.files, copies, strict=True):
                _write_changes(checkpoint, plan, file, folder / file, copied.result())
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
    """What one adapter adds to one tensor."""

    source: _Source
    index: torch.Tensor
    key: str
    seen: Fingerprint | None = None


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor: `original` is the key that is read, `index` the union of the parts' channels."""

    original: str
    dim: int
    index: torch.Tensor
    parts: list[_Part]


@dataclass(frozen=True)
class _Plan:
    """Key that is written -> its change; new key -> the tied tensor that it starts as; module -> weight, bias."""

    changes: dict[str, _Change] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    modules: dict[str, tuple[str, str | None]] = field(default_factory=dict)


def _ordered(adapters: Any, weights: Any) -> Iterator[tuple[str, float]]:
    """Locations and weights in the order in which the adapters are added."""
    if isinstance(adapters, Mapping):
        named = [(str(name), os.fspath(location)) for name, location in adapters.items()]
    else:
        listed = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
        if not isinstance(listed, Sequence) or not all(isinstance(one, (str, os.PathLike)) for one in listed):
            raise ActTypeError(f"adapters: got {str(adapters)[:80]}, expected a folder or Hub id, or a list of them")
        named = [(os.path.basename(os.path.normpath(one)), os.fspath(one)) for one in listed]
    if not named:
        raise ActValueError("adapters: got none, expected at least one adapter")
    if weights is None:
        factors = [1.0] * len(named)
    elif isinstance(weights, Mapping):
        if set(weights) != {name for name, _ in named}:
            raise ActValueError(
                f"weights: got {sorted(map(str, weights))}, expected one for each of {[name for name, _ in named]}"
            )
        factors = [weights[name] for name, _ in named]
    else:
        factors = list(weights) if isinstance(weights, Sequence) else [weights]
    if len(factors) != len(named):
        raise ActValueError(f"weights: got {len(factors)}, expected one for each of the {len(named)} adapters")
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise ActTypeError(f"weights: got {factor!r:.80}, expected numbers")
        if not math.isfinite(factor):
            raise ActValueError(f"weights: got {factor}, expected finite numbers")
    order = sorted(range(len(named)), key=lambda i: named[i][0])
    return iter([(named[i][1], float(factors[i])) for i in order])


def _make_plan(checkpoint: Checkpoint, sources: Sequence[_Source]) -> _Plan:
    """Find the tensor of every module of the adapters and check that they fit."""
    modules = {module: None for source in sources for module in source.adapter.modules}
    names = [f"{module}.weight" for module in modules]
    tied = _tied_pairs(checkpoint, names)
    change = prefix_change([*names, *tied, *tied.values()], checkpoint.names)
    plan = _Plan()
    for target, source in tied.items():
        new, old = key_for(target, change), key_for(source, change)
        new, old = (new, old) if new not in checkpoint else (old, new)
        if new not in checkpoint and old in checkpoint and {target, source} & set(names):
            plan.untied[new] = old
    for module in modules:
        written = key_for(f"{module}.weight", change)
        original = plan.untied.get(written, written)
        parts = [(s, s.adapter.modules[module]) for s in sources if module in s.adapter.modules]
        dim = _check_parts(checkpoint, module, original, parts)
        index = torch.cat([delta.index for _, delta in parts]).unique()  # sorted
        plan.changes[written] = _Change(original, dim, index, [_weight_part(s, d, module) for s, d in parts])
        bias = key_for(f"{module}.bias", change)
        _check_bias(checkpoint, module, bias, parts)
        if bias in checkpoint:
            plan.changes[bias] = _Change(bias, 0, index, [_Part(s, d.index, d.bias) for s, d in parts if d.bias])
        plan.modules[module] = (written, bias if bias in checkpoint else None)
    return plan


def _weight_part(source: _Source, delta: ModuleDelta, module: str) -> _Part:
    recorded = source.adapter.recorded_base(module)
    return _Part(source, delta.index, delta.weight, None if recorded is None else Fingerprint())


def _tied_pairs(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
    """Parameter -> the one that it is tied to; transformers is asked only where the answer is not in config.json."""
    configs = [checkpoint.config, checkpoint.config.get("text_config")]
    said = [c["tie_word_embeddings"] for c in configs if isinstance(c, Mapping) and "tie_word_embeddings" in c]
    return {} if said and not any(said) else tied_weights(load_config(checkpoint))


def _check_parts(checkpoint: Checkpoint, module: str, key: str, parts: Sequence[tuple[_Source, ModuleDelta]]) -> int:
    """Check the deltas of one module's weight; the axis of the channels follows from the shapes."""
    info = checkpoint.info(key)
    if not info.is_plain:
        raise ActValueError(
            f"{module}: {key} is {info.dtype}, expected F64, F32, F16 or BF16 (the base is quantised: merge into the "
            "original checkpoint, then quantise)"
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
    dim = min(axes, default=0)  # where both axes fit, all channels are selected, and the numbers are the same
    for source, delta in parts:
        if delta.index.numel() and int(delta.index[-1]) >= info.shape[dim]:
            raise ActLoadError(
                f"{module}: {source.adapter.location} selects channel {int(delta.index[-1])}, the base has "
                f"{info.shape[dim]} (the adapter was made for another model)"
            )
    return dim


def _check_bias(checkpoint: Checkpoint, module: str, key: str, parts: Sequence[tuple[_Source, ModuleDelta]]) -> None:
    has_bias = key in checkpoint
    for source, delta in parts:
        if has_bias != (delta.bias is not None):
            words = ("no deltas", "one") if has_bias else ("deltas", "none")
            raise ActLoadError(
                f"{module}: {source.adapter.location} has {words[0]} for the bias, the base has {words[1]} (the "
                "adapter was made for another model)"
            )
    if has_bias and not checkpoint.info(key).is_plain:
        raise ActValueError(f"{module}: {key} is {checkpoint.info(key).dtype}, expected F64, F32, F16 or BF16")
    if has_bias and any(int(d.index[-1]) >= math.prod(checkpoint.shape(key)) for _, d in parts if d.index.numel()):
        raise ActLoadError(f"{module}: {key} has shape {list(checkpoint.shape(key))}, fewer channels than the weight")


def _compare_base(checkpoint: Checkpoint, source: _Source, plan: _Plan) -> str | None:
    """Compare the base rows, hashed when they were read, with those that an adapter was made for, in words."""
    compared, differing = 0, []
    for module, (weight, bias) in plan.modules.items():
        recorded = source.adapter.recorded_base(module)
        for part in plan.changes[weight].parts:
            if part.source is source and part.seen is not None:
                compared += 1
                if bias is not None:
                    part.seen.add(checkpoint.rows(bias, part.index))
                if part.seen.result() != recorded:
                    differing.append(module)
    if not differing:
        return None
    return (
        f"{source.adapter.location}: was made for a base with other weights than {checkpoint.location}: "
        f"{len(differing)} of {compared} adapted modules differ, the first is {differing[0]} (merge it into "
        f"{source.adapter.config.get('base_model_name_or_path') or 'the base that it was trained on'})"
    )


# -------------------------------------------------------------------------------------------------------- writing ---


def _new_in(checkpoint: Checkpoint, plan: _Plan, file: str) -> dict[str, str]:
    """New keys of a file with the tensors that they start as."""
    return {key: source for key, source in plan.untied.items() if checkpoint.file_of(source) == file}


def _copy(checkpoint: Checkpoint, plan: _Plan, file: str, target: Path) -> Mapping[str, TensorInfo]:
    """Copy a file, with room for new tensors if it gets some; where everything lies in the copy."""
    shard = checkpoint.shard(file)
    new = _new_in(checkpoint, plan, file)
    if not new:
        copy_file(shard.path, target)
        return shard.tensors
    head, places = header_with(shard, new)
    copy_file(shard.path, target, offset=shard.data_start, head=head)
    return places


def _write_changes(
    checkpoint: Checkpoint, plan: _Plan, file: str, target: Path, places: Mapping[str, TensorInfo]
) -> None:
    """Write the changed rows and the new tensors of one file into its copy."""
    new = _new_in(checkpoint, plan, file)
    here = {key for key in plan.changes if key in new or (key in checkpoint and checkpoint.file_of(key) == file)}
    if not here and not new:
        return
    shard = checkpoint.shard(file)
    with open(target, "r+b", buffering=0) as out:
        for key in new.keys() - here:
            for first, stop in places[key].blocks():
                write_block(out, places[key], first, shard.block(new[key], first, stop))
        for key in here:
            _write_change(checkpoint, plan.changes[key], out, places[key], whole=key in new)


def _write_change(checkpoint: Checkpoint, change: _Change, out: BinaryIO, place: TensorInfo, *, whole: bool) -> None:
    """Write one tensor's merged rows, or columns, range by range along its first axis; `whole`: the other rows too."""
    shard = checkpoint.shard(checkpoint.file_of(change.original))
    for first, stop in place.blocks():
        if change.dim == 1:
            index = change.index
        else:
            i, j = torch.searchsorted(change.index, torch.tensor([first, stop])).tolist()
            index = change.index[i:j]
        if not index.numel() and not whole:
            continue
        parts = list(_deltas_between(change, first, stop))
        if change.dim == 0 and place.row_bytes > _SMALL_ROW and not whole:
            original = shard.rows(change.original, index)  # [K, ...]
            _note_seen(change, index, original)
            write_rows(out, place, index, merged_rows(original, index, parts, dim=0))
            continue
        block = shard.block(change.original, first, stop)
        local = index if change.dim == 1 else index - first
        original = block.index_select(change.dim, local)
        _note_seen(change, index, original)
        block.index_copy_(change.dim, local, merged_rows(original, index, parts, dim=change.dim))
        write_block(out, place, first, block)


def _note_seen(change: _Change, index: torch.Tensor, original: torch.Tensor) -> None:
    """Add base rows (the channels `index` of a range) to the fingerprints of the adapters that change them."""
    for part in change.parts:
        if part.seen is None:
            continue
        if part.index.numel() == change.index.numel():
            part.seen.add(original)
        else:
            part.seen.add(original.index_select(change.dim, torch.isin(index, part.index).nonzero().squeeze(1)))


def _deltas_between(change: _Change, first: int, stop: int) -> Iterator[ScaledDelta]:
    """Each adapter's channels and deltas that lie between two entries of the first axis."""
    for part in change.parts:
        shard = part.source.adapter.shard
        if change.dim == 1:
            yield part.index, shard.view(part.key, first, stop), part.source.weight
            continue
        i, j = torch.searchsorted(part.index, torch.tensor([first, stop])).tolist()
        yield part.index[i:j], shard.view(part.key, i, j), part.source.weight


def _small_files(folder: Path) -> list[str]:
    """The files beside the weights that belong to the model, by their names in the folder."""
    names = sorted(os.listdir(folder))
    small = [n for n in names if n == INDEX or (_is_like(n, SMALL_FILES) and not _is_like(n, _LEFT_OUT))]
    if (folder / _TEMPLATES).is_dir():
        small += [f"{_TEMPLATES}/{n}" for n in sorted(os.listdir(folder / _TEMPLATES)) if n.endswith(".jinja")]
    return small


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _write_untied(checkpoint: Checkpoint, plan: _Plan, folder: Path) -> None:
    """Say in the configuration and the index that there are two tensors now."""
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
