"""Check that several adapters share one base, and record the fingerprints of the base for the combined adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from act_peft.adapter.base_record import BaseComparison, fingerprint, module_record, recorded_base
from act_peft.adapter.changes import ModuleChange
from act_peft.combination.union import Source, UnionModule
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import key_for, prefix_change
from act_peft.disk.skeleton import load_config, tied_weights
from act_peft.errors import ActLoadError, ActValueError


def different_bases(sources: Sequence[Source]) -> Iterator[str]:
    """Reasons to doubt that the adapters share one base, from their records."""
    names = dict.fromkeys(s.changes.config.base_model_name_or_path for s in sources)
    named = [str(name) for name in names if name]
    if len(named) > 1:
        yield f"they name different bases ({', '.join(named)})"
    first: dict[tuple[str, bytes], tuple[str, str]] = {}
    comparisons: dict[tuple[str, str], BaseComparison] = {}
    for source in sources:
        for change in source.changes.modules:
            recorded = _recorded_base(source, change)
            if recorded is None:
                continue
            # Only fingerprints of the same channels can be compared.
            key = change.name, change.index.numpy().tobytes()
            partner, value = first.setdefault(key, (source.name, recorded))
            if partner != source.name:
                pair = source.name, partner
                comparison = comparisons.setdefault(pair, BaseComparison(source.name, f"that of {partner}"))
                comparison.add_(change.name, recorded, partial(str, value))
    yield from _notes(comparisons.values())


def _notes(comparisons: Iterable[BaseComparison]) -> Iterator[str]:
    return (note for comparison in comparisons if (note := comparison.note()) is not None)


def _recorded_base(source: Source, change: ModuleChange) -> str | None:
    return recorded_base(source.changes.config.adapted_modules, change.name)


def records(modules: Sequence[UnionModule], sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """The `adapted_modules` of the result without the base.

    A module has a fingerprint of its base rows only if one of the adapters has all its channels.
    """
    found = {}
    for module in modules:
        known = [
            _recorded_base(source, change)
            for source, change in zip(sources, module.changes, strict=True)
            if change is not None and change.index.numel() == module.index.numel()
        ]
        found[module.name] = _record(module, next((base for base in known if base is not None), None))
    return found


def records_on(
    checkpoint: Checkpoint, modules: Sequence[UnionModule], sources: Sequence[Source]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The `adapted_modules` of the result on a base, and notes on adapters that were made for a different one.

    Raises:
        ActLoadError: the adapters do not fit the base.
        ActValueError: the base has no such tensor, or a quantised one.
    """
    keys = _find_keys(checkpoint, modules)
    found = {}
    comparisons = [BaseComparison(source.name, checkpoint.location) for source in sources]
    for module in modules:
        rows = {part: _rows(checkpoint, module, part, keys[f"{module.name}.{part}"]) for part in module.shapes()}
        found[module.name] = _record(module, fingerprint(rows["weight"], rows.get("bias")))
        for source, change, comparison in zip(sources, module.changes, comparisons, strict=True):
            if change is not None:
                current = partial(_fingerprint_of, module, rows, change.index)
                comparison.add_(module.name, _recorded_base(source, change), current)
    return found, list(_notes(comparisons))


def _fingerprint_of(module: UnionModule, rows: Mapping[str, torch.Tensor], index: torch.Tensor) -> str:
    """Fingerprint of some of the rows that were read for a module."""
    where = torch.searchsorted(module.index, index)
    parts = {part: tensor.index_select(module.kind.axis_of(part), where) for part, tensor in rows.items()}
    return fingerprint(parts["weight"], parts.get("bias"))


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
    """The base parameters of the channels of all adapters."""
    info = checkpoint.info(key)
    dim = module.kind.axis_of(part)
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
