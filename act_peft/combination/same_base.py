"""Whether several adapters were made for one base, and the fingerprints of the base rows of their union."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from act_peft.adapter.base_record import fingerprint, module_record
from act_peft.adapter.changes import ModuleChange
from act_peft.combination.union import Source, UnionModule
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import key_for, prefix_change
from act_peft.disk.skeleton import load_config, tied_weights
from act_peft.errors import ActLoadError, ActValueError


def different_bases(sources: Sequence[Source]) -> Iterator[str]:
    """What speaks against one base for all adapters, in words, from what they have recorded."""
    names = dict.fromkeys(s.changes.config.base_model_name_or_path for s in sources)
    named = [str(name) for name in names if name]
    if len(named) > 1:
        yield f"they name different bases ({', '.join(named)})"
    first: dict[tuple[str, bytes], tuple[str, str]] = {}
    compared, differing = 0, []
    for source in sources:
        for change in source.changes.modules:
            recorded = recorded_base(source, change)
            if recorded is None:
                continue
            # Only fingerprints of the same channels can be compared.
            key = change.name, change.index.numpy().tobytes()
            other, value = first.setdefault(key, (source.name, recorded))
            if other != source.name:
                compared += 1
                if value != recorded:
                    differing.append(f"{change.name} of {other} and {source.name}")
    if differing:
        yield (
            f"the fingerprints of their bases differ in {len(differing)} of {compared} comparable modules, the first "
            f"is {differing[0]}"
        )


def recorded_base(source: Source, change: ModuleChange) -> str | None:
    """The fingerprint of the base rows that an adapter recorded for a module."""
    entry = (source.changes.config.adapted_modules or {}).get(change.name, {})
    return entry.get("base")


def records(modules: Sequence[UnionModule], sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """The `adapted_modules` of the result as far as they are known without the base.

    The fingerprint of a module's base rows is that of an adapter with the same channels, if there is one.
    """
    found = {}
    for module in modules:
        known = [
            recorded_base(source, change)
            for source, change in zip(sources, module.changes, strict=True)
            if change is not None and change.index.numel() == module.index.numel()
        ]
        found[module.name] = _record(module, next((base for base in known if base is not None), None))
    return found


def records_on(
    checkpoint: Checkpoint, modules: Sequence[UnionModule], sources: Sequence[Source]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The `adapted_modules` of the result on a base, and which adapters were made for another one, in words.

    Raises:
        ActLoadError: if the adapters do not fit the base.
        ActValueError: if the base lacks a tensor, or has a quantised one where they change it.
    """
    keys = _find_keys(checkpoint, modules)
    found = {}
    differing: dict[str, list[str]] = {source.name: [] for source in sources}
    for module in modules:
        rows = {part: _rows(checkpoint, module, part, keys[f"{module.name}.{part}"]) for part in module.shapes()}
        found[module.name] = _record(module, fingerprint(rows["weight"], rows.get("bias")))
        for source, change in zip(sources, module.changes, strict=True):
            recorded = None if change is None else recorded_base(source, change)
            if change is not None and recorded is not None:
                where = torch.searchsorted(module.index, change.index)
                weight = rows["weight"].index_select(module.kind.channel_dim, where)
                bias = rows["bias"][where] if module.has_bias else None
                if fingerprint(weight, bias) != recorded:
                    differing[source.name].append(module.name)
    notes = [
        f"{name} was made for a base with other weights than {checkpoint.location} ({len(wrong)} modules differ, the "
        f"first is {wrong[0]})"
        for name, wrong in differing.items()
        if wrong
    ]
    return found, notes


def _record(module: UnionModule, base: str | None) -> dict[str, Any]:
    return module_record(module.kind, selected=module.index.numel(), channels=module.num_channels, base=base)


def _find_keys(checkpoint: Checkpoint, modules: Sequence[UnionModule]) -> Mapping[str, str]:
    """Parameter name -> key in the checkpoint; a tied parameter that is not stored has the key of its partner."""
    names = [f"{module.name}.{part}" for module in modules for part in module.shapes()]
    change = prefix_change(names, checkpoint.names)
    keys = {name: key_for(name, change) for name in names}
    if any(key not in checkpoint for key in keys.values()):
        tied = tied_weights(load_config(checkpoint))
        change = prefix_change([*names, *tied, *tied.values()], checkpoint.names)
        keys = {name: key_for(name, change) for name in names}
        for one, other in [*tied.items(), *((b, a) for a, b in tied.items())]:
            if one in keys and keys[one] not in checkpoint:
                keys[one] = key_for(other, change)
    return keys


def _rows(checkpoint: Checkpoint, module: UnionModule, part: str, key: str) -> torch.Tensor:
    """The base parameters of the channels that the adapters change."""
    info = checkpoint.info(key)
    dim = module.kind.channel_dim if part == "weight" else 0
    shape = list(module.shapes()[part])
    shape[dim] = module.num_channels
    if list(info.shape) != shape:
        raise ActLoadError(
            f"{module.name}: size mismatch: {checkpoint.location} has {part} {list(info.shape)}, expected {shape} by "
            "the adapters (they were made for another model)"
        )
    if not info.is_plain:
        raise ActValueError(
            f"{module.name}: {checkpoint.location}: {key} is {info.dtype}, expected F64, F32, F16 or BF16 (the base "
            "is quantised: name the original checkpoint)"
        )
    return checkpoint.rows(key, module.index, dim)
