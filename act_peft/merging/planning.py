"""Planning a merge on disk: which rows of which tensors change, and which tensors are new."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from act_peft.adapter.base_record import BaseComparison, Fingerprint, fingerprint
from act_peft.adapter.stored import StoredDelta
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.layout import Layout, Piece, Place
from act_peft.disk.skeleton import check_ties_known
from act_peft.disk.ties import Untied, untie
from act_peft.errors import ActLoadError, ActValueError
from act_peft.merging.plan import Part, Plan, Source, TensorMerge
from act_peft.merging.whole import Wholes, find_wholes, new_config, plan_tokens


def make_plan(checkpoint: Checkpoint, sources: Sequence[Source]) -> Plan:
    """Find the tensor of everything that the adapters hold, and check that it fits.

    Raises:
        ActValueError: a missing or quantized tensor; two parts of the checkpoint that fit equally well.
        ActLoadError: an adapter that does not fit.
    """
    modules = list(dict.fromkeys(module for source in sources for module in source.adapter.modules))
    adapters = [source.adapter for source in sources]
    names = [f"{module}.weight" for module in modules]
    for adapter in adapters:
        names += [*adapter.byproducts.whole, *(f"{module}.weight" for module in adapter.byproducts.tokens)]
    keys = CheckpointKeys(
        checkpoint,
        list(dict.fromkeys(names)),
        fits=lambda name, shape: all(adapter.fits(name, shape) for adapter in adapters),
        recognize=lambda candidate: sum(adapter.recognize(candidate) for adapter in adapters),
    )
    wholes = find_wholes(checkpoint, keys, sources)
    changed = [f"{module}.{part}" for module in modules for part in ("weight", "bias")]
    layout = keys.layout
    if layout is None:
        check_ties_known(checkpoint)
        ties = Untied()
    else:
        parting = map(keys.own_name, [*changed, *wholes.trained])
        ties = untie(layout, [own for own in parting if layout.holder(own) is not None])
    plan = Plan(checkpoint, keys)
    new = {name: _new_place(plan, name, holder) for name, holder in ties.copies.items()}
    _plan_starts(plan, wholes, new)
    for module in modules:
        places = [new.get(keys.own_name(name)) or keys.place(name) for name in (f"{module}.weight", f"{module}.bias")]
        parts = [(source, source.adapter.modules[module]) for source in sources if module in source.adapter.modules]
        if places[0] is None:
            checkpoint.file_of(keys.key(f"{module}.weight"))  # raises, and says what is missing
        dim = _check_weight(plan, module, places[0], parts)
        _check_bias(plan, module, places[1], parts)
        for source, delta in parts:
            weight = cast(Place, places[0])
            recorded = source.adapter.recorded_base(module) is not None
            seen = Fingerprint() if recorded and weight.key is not None else None
            plan.compared.append((source, module, dim, seen))
            _add_part(plan, weight, dim, Part(source, module, delta.index, delta.weight, seen=seen))
            if places[1] is not None and delta.bias is not None:
                _add_part(plan, places[1], 0, Part(source, module, delta.index, delta.bias))
    plan_tokens(plan, sources, {*changed, *wholes.trained})
    plan.config.update(new_config(plan, says_untied=ties.says_so))
    return plan


def _new_place(plan: Plan, name: str, holder: str) -> Place:
    """Plan a tensor of its own for a tied parameter; both names are those in the checkpoint's model."""
    layout = cast(Layout, plan.keys.layout)
    place, new = layout.place(holder), layout.new_key(name)
    if place is None or place.key is None:
        raise ActValueError(
            f"{plan.checkpoint.location}: {name} shares rows of {layout.keys_of(holder)[0]}, expected a whole tensor "
            "(merge in memory, with model.merge_and_unload())"
        )
    plan.untied[new] = place.key
    return Place((Piece(new),))


def _plan_starts(plan: Plan, wholes: Wholes, new: Mapping[str, Place]) -> None:
    """Plan whole tensors: those of the base for all parameters that are tied to them, trained ones for one alone."""
    for name, start in wholes.of_base.items():
        plan.starts[str(cast(Place, plan.keys.place(name)).key)] = start
    for key, source in plan.untied.items():
        if source in plan.starts:
            plan.starts[key] = plan.starts[source]
    for name, start in wholes.trained.items():
        place = new.get(plan.keys.own_name(name)) or cast(Place, plan.keys.place(name))
        plan.starts[str(place.key)] = start


def _shape_of(plan: Plan, name: str, place: Place | None) -> tuple[int, ...]:
    """The shape that a parameter is going to have."""
    if place is not None and place.key in plan.starts:
        return plan.info(str(place.key)).shape
    return plan.keys.shape(name)


def _add_part(plan: Plan, place: Place, dim: int, part: Part) -> None:
    """Add what an adapter changes of a parameter to the changes of the tensors that hold it."""
    for piece in place.pieces:
        here = part
        if piece.channels is not None and piece.rows is not None:
            if dim:
                raise ActValueError(
                    f"{part.module}: its channels are columns, and its weight is a part of {piece.key}, expected a "
                    "whole tensor (merge in memory, with model.merge_and_unload())"
                )
            order = torch.isin(part.index, piece.channels).nonzero().squeeze(1)
            rows, sorting = piece.rows[torch.searchsorted(piece.channels, part.index[order])].sort()
            if not rows.numel():
                continue
            here = replace(part, index=rows, order=order[sorting])
        old = plan.changes.get(piece.key)
        index = here.index if old is None else torch.cat([old.index, here.index]).unique()  # sorted
        parts = [here] if old is None else [*old.parts, here]
        plan.changes[piece.key] = TensorMerge(dim, index, parts)


def _check_weight(plan: Plan, module: str, place: Place | None, parts: Sequence[tuple[Source, StoredDelta]]) -> int:
    """Check the deltas of one module's weight; the axis of the channels follows from the shapes."""
    name, keys = f"{module}.weight", plan.keys
    info = plan.checkpoint.info(keys.key(name))
    if not info.is_plain:
        raise ActValueError(
            f"{module}: {keys.key(name)} is {info.dtype}, expected F64, F32, F16 or BF16 (the base is quantized: "
            "merge into the original checkpoint, then quantize)"
        )
    shape = _shape_of(plan, name, place)
    axes = {0, 1}
    for source, delta in parts:
        fitting = {
            dim
            for dim in range(min(len(shape), 2))
            if delta.weight_shape == (*shape[:dim], delta.index.numel(), *shape[dim + 1 :])
        }
        if not fitting:
            raise ActLoadError(
                f"{module}: size mismatch: {source.adapter.location} has deltas {list(delta.weight_shape)} for "
                f"{delta.index.numel()} channels, the base has weight {list(shape)} (the adapter was made for "
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
        if delta.index.numel() and int(delta.index[-1]) >= shape[dim]:
            raise ActLoadError(
                f"{module}: {source.adapter.location} selects channel {int(delta.index[-1])}, the base has "
                f"{shape[dim]} (the adapter was made for another model)"
            )
    return dim


def _check_bias(plan: Plan, module: str, place: Place | None, parts: Sequence[tuple[Source, StoredDelta]]) -> None:
    name, keys = f"{module}.bias", plan.keys
    has_bias = keys.holds(name)
    for source, delta in parts:
        leaves_out = delta.bias is None and not source.adapter.config.include_bias
        if has_bias == (delta.bias is None) and not leaves_out:
            words = ("deltas", "none") if not has_bias else ("no deltas", "one")
            raise ActLoadError(
                f"{module}: {source.adapter.location} has {words[0]} for the bias, the base has {words[1]} (the "
                "adapter was made for another model)"
            )
    if not has_bias:
        return
    info = plan.checkpoint.info(keys.key(name))
    if not info.is_plain:
        raise ActValueError(f"{module}: {keys.key(name)} is {info.dtype}, expected F64, F32, F16 or BF16")
    selected = max((int(delta.index[-1]) for _, delta in parts if delta.index.numel()), default=-1)
    shape = _shape_of(plan, name, place)
    if selected >= math.prod(shape):
        raise ActLoadError(f"{module}: {keys.key(name)} has shape {list(shape)}, fewer channels than the weight")


def compare_base(checkpoint: Checkpoint, source: Source, plan: Plan) -> str | None:
    """Compare the base rows, hashed when they were read, with those that an adapter was made for."""
    comparison = BaseComparison(source.adapter.location, checkpoint.location)
    for one, module, dim, seen in plan.compared:
        if one is source:
            current = partial(_base_of, plan.keys, module, source.adapter.modules[module], dim, seen)
            comparison.add_(module, source.adapter.recorded_base(module), current)
    note = comparison.note()
    home = source.adapter.config.base_model_name_or_path or "the base that it was trained on"
    return None if note is None else f"{note} (merge it into {home})"


def _base_of(keys: CheckpointKeys, module: str, delta: StoredDelta, dim: int, seen: Fingerprint | None) -> str:
    bias = None if delta.bias is None else keys.rows(f"{module}.bias", delta.index)
    if seen is None:
        return fingerprint(keys.rows(f"{module}.weight", delta.index, dim), bias)
    if bias is not None:
        seen.add(bias)
    return seen.result()
