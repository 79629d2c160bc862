"""Check that several adapters share one base, and record the fingerprints of the base for the combined adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from act_peft.adapter.base_record import (
    BaseComparison,
    fingerprint,
    module_record,
    recorded_base,
    recorded_sample,
)
from act_peft.adapter.changes import ModuleChange, OtherTensor
from act_peft.adapter.models import record_of
from act_peft.combination.union import Source, UnionModule
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.parameters import Parameters
from act_peft.doors import OUTER
from act_peft.errors import ActLoadError

_COMPARED = 4  # modules whose base rows are read to recognize a part of a checkpoint


def different_bases(sources: Sequence[Source], *, by_names: bool) -> Iterator[str]:
    """Reasons to doubt that the adapters share one base, from their records.

    Fingerprints decide; names, which may mean nothing on this machine, only where no fingerprints can be compared.

    Args:
        sources: the adapters.
        by_names: whether names count at all; not where the base itself is there to compare with.
    """
    first: dict[tuple[str, bool, bytes | None], tuple[str, str]] = {}
    comparisons: dict[tuple[str, str], BaseComparison] = {}
    for source in sources:
        for change in source.changes.modules:
            # Fingerprints of the selected rows can be compared where the parameters are the same, samples always.
            recorded = {
                (change.name, change.has_bias, change.index.numpy().tobytes()): _recorded_base(source, change),
                (change.name, False, None): recorded_sample(source.changes.config.adapted_modules, change.name),
            }
            known = {key: value for key, value in recorded.items() if value is not None}
            for key, value in known.items():
                if key in first and first[key][0] != source.name:
                    partner, other = first[key]
                    pair = source.name, partner
                    comparison = comparisons.setdefault(pair, BaseComparison(source.name, f"that of {partner}"))
                    comparison.add_(change.name, value, partial(str, other))
                    break
            for key, value in known.items():
                first.setdefault(key, (source.name, value))
    yield from _notes(comparisons.values())
    if by_names and any(all(source.name not in pair for pair in comparisons) for source in sources):
        names = dict.fromkeys(source.changes.config.base_model_name_or_path for source in sources)
        named = [str(name) for name in names if name]
        if len(named) > 1:
            yield f"they name different bases ({', '.join(named)})"


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
            if change is not None
            and change.index.numel() == module.index.numel()
            and change.has_bias == module.has_bias
        ]
        samples = [recorded_sample(source.changes.config.adapted_modules, module.name) for source in sources]
        found[module.name] = _record(module, _first(known), _first(samples))
    return found


def _first(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value is not None), None)


def records_on(
    checkpoint: Checkpoint, modules: Sequence[UnionModule], sources: Sequence[Source]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The `adapted_modules` of the result on a base, and notes on adapters that were made for a different one.

    Raises:
        ActLoadError: if the adapters do not fit the base.
        ActValueError: if a tensor that the adapters change is missing in the base, or quantized.
    """
    base = Parameters(
        checkpoint,
        [f"{module.name}.{part}" for module in modules for part in module.shapes()],
        fits=partial(_fits, {module.name: module for module in modules}),
        recognize=partial(_recognize, modules, sources),
    )
    found = {}
    samples = record_of(base, [module.name for module in modules]).fingerprints
    comparisons = [BaseComparison(source.name, checkpoint.location) for source in sources]
    for module in modules:
        rows = {part: _rows(base, module, part) for part in module.shapes()}
        found[module.name] = _record(module, fingerprint(rows["weight"], rows.get("bias")), samples.get(module.name))
        for source, change, comparison in zip(sources, module.changes, comparisons, strict=True):
            if change is not None:
                current = partial(_fingerprint_of, module, rows, change)
                comparison.add_(module.name, _recorded_base(source, change), current)
    return found, list(_notes(comparisons))


def _fits(modules: Mapping[str, UnionModule], parameter: str, shape: Sequence[int]) -> bool:
    name, _, part = parameter.rpartition(".")
    return name not in modules or tuple(shape) == _shape_in_base(modules[name], part)


def _recognize(modules: Sequence[UnionModule], sources: Sequence[Source], keys: CheckpointKeys) -> int:
    """How many of some modules have base rows in a checkpoint that give a recorded fingerprint."""
    found = 0
    for module in modules[:_COMPARED]:
        for source, change in zip(sources, module.changes, strict=True):
            if change is None or not keys.holds(f"{module.name}.weight"):
                continue
            if keys.shape(f"{module.name}.weight") != _shape_in_base(module, "weight"):
                continue
            parts = {
                part: keys.rows(f"{module.name}.{part}", change.index, module.kind.axis_of(part))
                for part in _parts(change)
                if keys.holds(f"{module.name}.{part}")
            }
            found += fingerprint(parts["weight"], parts.get("bias")) == _recorded_base(source, change)
    return found


def _shape_in_base(module: UnionModule, part: str) -> tuple[int, ...]:
    shape = list(module.shapes()[part])
    shape[module.kind.axis_of(part)] = module.num_channels
    return tuple(shape)


def _fingerprint_of(module: UnionModule, rows: Mapping[str, torch.Tensor], change: ModuleChange) -> str:
    """Fingerprint of some of the rows that were read for a module."""
    where = torch.searchsorted(module.index, change.index)
    parts = {part: rows[part].index_select(module.kind.axis_of(part), where) for part in _parts(change)}
    return fingerprint(parts["weight"], parts.get("bias"))


def _parts(change: ModuleChange) -> list[str]:
    return ["weight", "bias"] if change.has_bias else ["weight"]


def _record(module: UnionModule, base: str | None, sample: str | None) -> dict[str, Any]:
    selected = module.index.numel()
    return module_record(module.kind, selected=selected, channels=module.num_channels, base=base, sample=sample)


def _rows(base: Parameters, module: UnionModule, part: str) -> torch.Tensor:
    """The base parameters of the channels that the adapters change."""
    name = f"{module.name}.{part}"
    dim = module.kind.axis_of(part)
    shape = _shape_in_base(module, part)
    if base.shape(name) != shape:
        raise ActLoadError(
            f"{module.name}: size mismatch: {base.location} has {part} {list(base.shape(name))}, expected "
            f"{list(shape)} by the adapters (they were made for a different model)"
        )
    return base.rows(name, module.index, dim)


def tensors_of_base(sources: Sequence[Source], adapted: Collection[str]) -> dict[str, OtherTensor]:
    """The tensors of the base that the adapters hold, as embeddings of a resized vocabulary, for the combined one.

    Args:
        sources: the adapters.
        adapted: the modules that the combined adapter changes.

    Raises:
        ActLoadError: two adapters hold different ones.
    """
    found: dict[str, tuple[Source, OtherTensor]] = {}
    for source in sources:
        for name, tensor in source.changes.of_base.items():
            other, first = found.setdefault(name, (source, tensor))
            if tensor is not first and not torch.equal(tensor.read(), first.read()):
                raise ActLoadError(
                    f"{name}: {source.name} and {other.name} hold different tensors of the base, expected equal ones "
                    "(save the adapters without them, with save_pretrained(..., save_embedding_layers=False))"
                )
    keys = {}
    for name, (_, tensor) in sorted(found.items()):
        module, _, part = name.rpartition(".")
        keys[f"{OUTER}{module}{'.base_layer' if module in adapted else ''}.{part}"] = tensor
    return keys
