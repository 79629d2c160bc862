"""Planning a merge on disk: whole tensors and rows of tokens that adapters bring, and what the configuration says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from act_peft.adapter.byproducts import TokenRows
from act_peft.disk.checkpoint import Checkpoint, read_json
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.layout import Layout
from act_peft.disk.shard import DTYPES
from act_peft.disk.skeleton import build_skeleton, load_config
from act_peft.disk.ties import without_ties
from act_peft.doors import EMBEDDING_LAYER_NAMES
from act_peft.errors import ActLoadError, ActValueError
from act_peft.merging.plan import NewRows, Plan, Source, Start
from act_peft.transfer.parameters import vocabulary_parameters

_IN_MEMORY = "merge in memory, with model.merge_and_unload()"


@dataclass(frozen=True)
class Wholes:
    """The whole tensors of all adapters.

    Attributes:
        of_base: parameter -> what it starts as; it stays tied as it is.
        trained: the same for modules that were trained (`modules_to_save`), which part from what they are tied to.
    """

    of_base: dict[str, Start] = field(default_factory=dict)
    trained: dict[str, Start] = field(default_factory=dict)


def find_wholes(checkpoint: Checkpoint, keys: CheckpointKeys, sources: Sequence[Source]) -> Wholes:
    """The whole tensors that the adapters bring, checked against the checkpoint.

    Raises:
        ActLoadError: a tensor that the checkpoint does not have, of another shape, or not the same in all adapters.
        ActValueError: a tensor that cannot be written; channels of a module that an adapter saves as a whole.
    """
    wholes = Wholes()
    owners: dict[str, tuple[Source, Start]] = {}
    for source in sources:
        adapter = source.adapter
        for name, tensor in adapter.byproducts.whole.items():
            start = Start(adapter.shard, tensor.key)
            key = _key_for(checkpoint, keys, source, name)
            if not tensor.is_trained and not _brings(checkpoint, keys, source, name, key, start):
                continue
            _check_shape(checkpoint, keys, source, name, key, start)
            place = name if tensor.is_trained else key  # one tensor of the base may have several names
            other, its = owners.setdefault(place, (source, start))
            if not _are_equal(start, its, DTYPES[checkpoint.info(key).dtype]):
                raise ActLoadError(
                    f"{name}: {adapter.location} and {other.adapter.location} hold different values of the whole "
                    "tensor, expected the same (merge one of them alone, or save them with "
                    "save_embedding_layers=False)"
                )
            (wholes.trained if tensor.is_trained else wholes.of_base)[name] = start
    for name in wholes.trained:
        module = name.rpartition(".")[0]
        for source in sources:
            if module in source.adapter.modules or module in source.adapter.byproducts.tokens:
                raise ActValueError(
                    f"{module}: is saved as a whole by one adapter (modules_to_save), and {source.adapter.location} "
                    "changes channels or tokens of it, expected either of them (leave one of the adapters out)"
                )
    return wholes


def _key_for(checkpoint: Checkpoint, keys: CheckpointKeys, source: Source, name: str) -> str:
    """The key of the checkpoint's tensor that a whole tensor replaces."""
    place = keys.place(name)
    if place is None:
        raise ActLoadError(
            f"{name}: {source.adapter.location} saves it as a whole, {checkpoint.location} has no such tensor, "
            "expected a checkpoint of the class that the adapter was trained with (merge in memory, with "
            "model.merge_and_unload() of a model of that class)"
        )
    if place.key is None:
        raise ActValueError(
            f"{name}: is a part of {place.pieces[0].key}, expected a tensor of its own to replace ({_IN_MEMORY})"
        )
    if not checkpoint.info(place.key).is_plain:
        raise ActValueError(
            f"{name}: {place.key} is {checkpoint.info(place.key).dtype}, expected F64, F32, F16 or BF16 (the base is "
            "quantized: merge into the original checkpoint, then quantize)"
        )
    return place.key


def _brings(checkpoint: Checkpoint, keys: CheckpointKeys, source: Source, name: str, key: str, start: Start) -> bool:
    """Whether a tensor of the base, saved with the adapter, changes the checkpoint.

    Raises:
        ActLoadError: it does, and is no embedding.
    """
    own = Start(checkpoint.shard(checkpoint.file_of(key)), key)
    if _are_equal(start, own, DTYPES[checkpoint.info(key).dtype]):
        return False
    embeddings = _vocabulary(keys)
    if keys.own_name(name) not in embeddings if embeddings else name.split(".")[-2] not in EMBEDDING_LAYER_NAMES:
        raise ActLoadError(
            f"{name}: {source.adapter.location} holds it with other values than {checkpoint.location}, expected whole "
            "tensors only of embeddings, which PEFT saves, and of modules_to_save (the adapter was made for another "
            "model, or the file is damaged)"
        )
    return True


def _vocabulary(keys: CheckpointKeys) -> Collection[str]:
    """The embeddings of the checkpoint's model, by its own names; nothing where it is not known."""
    return vocabulary_parameters(keys.layout.model) if keys.layout is not None else ()


def _check_shape(
    checkpoint: Checkpoint, keys: CheckpointKeys, source: Source, name: str, key: str, start: Start
) -> None:
    """Check that a whole tensor has the shape of the checkpoint's, or is an embedding with more or fewer tokens."""
    shape, found = checkpoint.shape(key), start.shard.shape(start.key)
    flat = len(shape) > 2 and found == (shape[0], torch.Size(shape[1:]).numel())
    resized = keys.own_name(name) in _vocabulary(keys) and shape[1:] == found[1:] and found[:1] > (0,)
    if found != shape and not flat and not resized:
        raise ActLoadError(
            f"{name}: size mismatch: {source.adapter.location} holds {list(found)}, {checkpoint.location} has "
            f"{list(shape)} (the adapter was made for another model)"
        )


def _are_equal(one: Start, other: Start, dtype: torch.dtype) -> bool:
    """Whether two tensors have the same values, once they are rounded to a dtype."""
    if one == other:
        return True
    shapes = [start.shard.shape(start.key) for start in (one, other)]
    if torch.Size(shapes[0]).numel() != torch.Size(shapes[1]).numel() or shapes[0][:1] != shapes[1][:1]:
        return False
    if not shapes[0]:
        return torch.equal(*(start.shard.tensor(start.key).to(dtype) for start in (one, other)))
    for first, stop in one.shard.info(one.key).blocks():
        a, b = (start.shard.view(start.key, first, stop).to(dtype) for start in (one, other))
        if not torch.equal(a.flatten(), b.flatten()):
            return False
    return True


# --------------------------------------------------------------------------------------------------------- tokens ---


def plan_tokens(plan: Plan, sources: Sequence[Source], changed: Collection[str]) -> None:
    """Plan the rows of tokens (`trainable_token_indices`); whatever is tied to the embedding changes with it.

    Args:
        plan: where they are added.
        sources: the adapters.
        changed: the parameters that change in another way.

    Raises:
        ActLoadError: rows that do not fit; several adapters with rows of the same token.
        ActValueError: channels of the same tensor.
    """
    for source in sources:
        for module, tokens in source.adapter.byproducts.tokens.items():
            name, where = f"{module}.weight", f"{module}: {source.adapter.location}"
            key = _key_for(plan.checkpoint, plan.keys, source, name)
            layout, own = plan.keys.layout, plan.keys.own_name(name)
            users = {own} if layout is None else {own, *layout.group(own)}
            also = [other for other in changed if plan.keys.own_name(other) in users]
            if also:
                raise ActValueError(
                    f"{where} has rows of tokens (trainable_token_indices), and channels or a whole tensor of "
                    f"{also[0]}, which is the same tensor, change too; expected either of them (leave one of the "
                    "adapters out)"
                )
            shape = plan.info(key).shape
            stored = source.adapter.shard.shape(tokens.key)
            if stored[1:] != shape[1:] or int(tokens.index[-1]) >= shape[0]:
                raise ActLoadError(
                    f"{where} has rows {list(stored)} of tokens up to {int(tokens.index[-1])}, the base has "
                    f"{list(shape)} (the adapter was made for another model)"
                )
            rows = plan.rows.setdefault(key, [])
            if any(_are_twice(one, tokens) for one in rows if one.source is source):
                continue
            for other in rows:
                if torch.isin(tokens.index, other.tokens.index).any():
                    raise ActLoadError(
                        f"{where} and {other.source.adapter.location} have rows of the same tokens, expected "
                        "different ones (merge one of them alone)"
                    )
            rows.append(NewRows(source, module, tokens))


def _are_twice(one: NewRows, tokens: TokenRows) -> bool:
    """Whether an adapter holds the same rows for two modules that share the tensor."""
    shard, its = one.source.adapter.shard, one.tokens
    return torch.equal(its.index, tokens.index) and torch.equal(shard.tensor(its.key), shard.tensor(tokens.key))


# -------------------------------------------------------------------------------------------------- configuration ---


def new_config(plan: Plan, *, says_untied: bool) -> dict[str, Any]:
    """What `config.json` has to say about ties and the number of tokens; empty if it stays as it is.

    Raises:
        ActLoadError: embeddings of different numbers of tokens, or a parameter that would have to be as long.
    """
    checkpoint, layout = plan.checkpoint, plan.keys.layout
    resized = {key: info.shape[0] for key, info in plan.new_sizes().items() if key in plan.starts}
    resized = {k: n for k, n in resized.items() if n != checkpoint.shape(plan.untied.get(k, k))[0]}
    if not says_untied and not resized:
        return {}
    written, config = read_json(checkpoint.folder, "config.json", finite=False), load_config(checkpoint)
    if resized:
        rows = next(iter(resized.values()))
        _resize(written, config, rows=rows)
        _check_resized(plan, cast(Layout, layout), build_skeleton(config, checkpoint).state_dict(), rows=rows)
    return without_ties(written, config) if says_untied else written


def _resize(written: dict[str, Any], config: Any, *, rows: int) -> None:
    """Write a number of tokens into a configuration, as it is written and as an object."""
    text = config.get_text_config()
    name = next((name for name, part in vars(config).items() if part is text), None)
    (written if name is None else written.setdefault(name, {}))["vocab_size"] = rows
    text.vocab_size = rows


def _check_resized(plan: Plan, layout: Layout, expected: Mapping[str, torch.Tensor], *, rows: int) -> None:
    """Check that all parameters that depend on the number of tokens, and no others, get the new one."""
    embeddings = _vocabulary(plan.keys)
    for name, before in layout.model.state_dict().items():
        holder = layout.holder(name)
        if holder is None or (expected[name].shape == before.shape and name not in embeddings):
            continue
        place, new = layout.place(holder), layout.new_key(name)
        found = before.shape
        if place is not None and place.key is not None:
            found = torch.Size(plan.info(new if new in plan.untied else place.key).shape)
        if found != expected[name].shape:
            raise ActLoadError(
                f"{name}: would have {list(found)} beside embeddings of {rows} tokens, expected "
                f"{list(expected[name].shape)} (the adapter holds resized embeddings, but not all that depends on "
                f"their number: {_IN_MEMORY})"
            )
