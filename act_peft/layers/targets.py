"""The modules and channels of an adapter, found and checked before the model is changed."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from act_peft.adapter.config import ActConfig
from act_peft.channels.kinds import channel_kind, num_channels
from act_peft.channels.masks import ChannelMask, checked_indices
from act_peft.channels.names import matching_key, suffixes
from act_peft.disk.quantization import quantization_method
from act_peft.disk.rules import WeightRenaming, get_model_conversion_mapping, rename_source_key
from act_peft.doors import (
    COMPILED,
    check_target_module_exists,
    include_all_linear_layers_,
    is_read_by_mamba_kernel,
)
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers.auxiliary import check_auxiliary, check_not_hidden, is_saved_whole
from act_peft.layers.deltas import PREFIX, unknown_index
from act_peft.peft_modules import inner_layer
from act_peft.shards import is_flattened, is_tensor_parallel


@dataclass(frozen=True)
class Targets:
    """The modules of a model that get an adapter, decided once.

    Attributes:
        indices: module name -> channels, int64 `[K]`.
        answers: name of every module -> the answer to PEFT's question whether it is a target (`target_answers`).
    """

    indices: dict[str, torch.Tensor]
    answers: dict[str, Any]


def find_targets(config: ActConfig, model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None) -> Targets:
    """Find the target modules of an adapter and their channels.

    The channels are those of `config.channels`. If the adapter is being loaded, only their number is known, from the
    state dict or from the record in the configuration; the channels are then -1.

    Args:
        config: the adapter's configuration.
        model: the base model, with or without adapters in it.
        state_dict: the adapter's tensors, if their names decide about the modules.

    Raises:
        ActValueError: no channels, a name that matches no module, a channel out of range, a mask of another model.
        ActTypeError: a module of a kind that has no channels.
    """
    if config.channels is None and config.adapted_modules is None:
        raise ActValueError(
            "channels: got none, expected a ChannelMask, a dict of lists or a saved mask "
            "(for example ActConfig(channels=localize(base, donor, dataloader).top(0.2, scope='module')))"
        )
    channels = given_channels(config)
    known = {suffix for name, _ in model.named_modules() for suffix in suffixes(name)}
    unknown = [key for key in channels if key not in known]
    check_not_hidden([key for key in unknown if _is_target(config, channels, key)], model)
    if unknown and config.chosen_targets is None:
        _refuse_names(unknown, channels, model)
    include_all_linear_layers_(config, model)
    stored = None if state_dict is None else _stored_counts(state_dict)
    prefix = "" if stored is None else COMPILED  # where PEFT ignores this prefix too
    modules = {name.removeprefix(prefix): module for name, module in model.named_modules()}
    answers = target_answers(config, modules)
    wanted = [name for name in modules if name and (name in stored if stored is not None else answers[name])]
    check_auxiliary(config, model, [*wanted, *_held_back(config, modules)])
    indices = {}
    for name in wanted:
        _check_kind(name, modules[name], model)
        index = _index_for(name, config, channels, stored, modules[name])
        if index is None:
            continue
        _check_spread(name, model)
        user = _user_of_weight(name, model)
        if user is not None:
            raise ActValueError(
                f"{name}: never runs in a {type(model).__name__}, which uses its weight in {user}, expected channels "
                f"of a module that runs (take {user!r}, or leave it out with exclude_modules=[{name!r}])"
            )
        if f"{name}.weight" in (getattr(model, "_keys_to_ignore_on_save", None) or ()):
            raise ActValueError(
                f"{name}: {type(model).__name__} computes its weight and never saves it, expected channels of a "
                f"module that is saved (leave it out with exclude_modules=[{name!r}])"
            )
        reader = _reader_of_weights(name, model)
        if reader is not None:
            raise ActValueError(
                f"{name}: cannot be adapted in {reader}, which reads its weight instead of calling it "
                f"(leave it out with exclude_modules=[{name.rpartition('.')[2]!r}])"
            )
        indices[name] = index
    if not indices and config.chosen_targets is None:
        raise ActValueError(
            "channels: no channel of a module that may be adapted is selected, expected at least one "
            "(a higher density, or other exclude_modules)"
        )
    return Targets(indices, answers)


def _reader_of_weights(name: str, model: nn.Module) -> str | None:
    """What reads the weight of a module instead of calling the module: a delta would have no effect there."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if is_read_by_mamba_kernel(model, own):
        return f"the fused kernel of a {cast(Any, model).config.model_type} model"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return "the fast path of nn.TransformerEncoderLayer (torch.backends.mha.set_fastpath_enabled(False) ends that)"
    return None


def _check_spread(name: str, model: nn.Module) -> None:
    """Refuse a module whose weight is spread over processes in a way that no layer can handle."""
    module = inner_layer(model.get_submodule(name))
    if is_tensor_parallel(module, model):
        raise ActValueError(
            f"{name}: is spread over processes by tensor parallelism, expected a weight in one piece, or spread by "
            "FSDP2 or ZeRO 3 (load the model without tp_plan; for inference, merge the adapter with merge_checkpoint "
            "and load the merged checkpoint with tp_plan)"
        )
    if is_flattened(model):
        raise ActValueError(
            f"{name}: is inside FullyShardedDataParallel, which has flattened its weight, expected the model before "
            "that (get_peft_model first, then wrap it; or FSDP2)"
        )


def _user_of_weight(name: str, model: nn.Module) -> str | None:
    """The embedding that runs in place of one that only lends it its weight (`shared` in T5 and BART)."""
    module = inner_layer(model.get_submodule(name))
    if not isinstance(module, nn.Embedding):
        return None
    users = [
        other
        for other, its in model.named_modules()
        if isinstance(its, nn.Embedding) and its is not module and its.weight is module.weight
    ]
    parent, _, own = name.rpartition(".")
    owner = type(model.get_submodule(parent))
    if not users or not issubclass(owner, PreTrainedModel):
        return None
    try:
        code = "".join(inspect.getsource(each) for each in owner.__mro__[: owner.__mro__.index(PreTrainedModel)])
    except (OSError, TypeError):  # a class without a file
        return None
    runs = f"self.{own}(" in code or "self.get_input_embeddings()(" in code
    return None if runs else users[0].removesuffix(".base_layer")


def target_answers(config: ActConfig, names: Iterable[str]) -> dict[str, Any]:
    """What PEFT's own check returns for each module, narrowed to modules with selected channels.

    Args:
        config: the adapter's configuration.
        names: names of modules.

    Returns:
        Module name -> true for a target; false for others; PEFT's own false marker for modules that the user excluded.
    """
    channels = given_channels(config)
    return {name: _is_target(config, channels, name) for name in names}


def _held_back(config: ActConfig, names: Iterable[str]) -> list[str]:
    """The modules that would be targets if `modules_to_save` did not take them, which PEFT excludes silently."""
    others = copy.copy(config)
    others.modules_to_save = None
    return [
        name
        for name, found in target_answers(others, [n for n in names if is_saved_whole(config, n)]).items()
        if found
    ]


def _is_target(config: ActConfig, channels: Mapping[str, Any], name: str) -> Any:
    entry = matching_key(name, channels)
    if config.from_file:  # the record says which modules they are, whatever was chosen once
        return entry is not None
    if config.chosen_targets is None:
        if entry is None or (config.layers_to_transform is not None and "." not in name):
            return False
        # `target_modules` itself stays None, because PEFT saves a whole embedding whose name it finds there. The last
        # part of the name alone makes PEFT look at `layers_to_transform`, which it ignores for full names.
        config = copy.copy(config)
        config.target_modules = {name.rpartition(".")[2]}
    found = check_target_module_exists(config, name)
    if not found or config.channels is None:
        return found
    return found if entry is not None and len(channels[entry]) else False


def _refuse_names(unknown: Sequence[str], channels: Collection[str], model: nn.Module) -> None:
    """Say what names of channels are that match no module."""
    for name, parameter in model.named_parameters():
        if unknown[0] in suffixes(name):
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ActTypeError(
                f"channels: {name} is a parameter {list(parameter.shape)} of {type(owner).__name__}, expected the "
                "name of a Linear, Conv1D, Embedding or norm module (fused experts are none: leave them out, or train "
                "them with LoraConfig(target_parameters=...))"
            )
    renamed = "; of a saved adapter whose modules were renamed since: from_pretrained takes key_mapping={old: new}"
    raise ActValueError(
        f"channels: {unknown[0]!r} matches no module of {type(model).__name__}, expected names of its modules "
        f"({len(unknown)} of {len(channels)} names match none; the mask belongs to another model"
        f"{'' if isinstance(channels, ChannelMask) else renamed})"
    )


def renamed_record(record: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The record of an adapter's modules under the names that these modules have in the model.

    Modules have got new names since some adapters were saved. PEFT renames their tensors (`key_mapping`), but only
    after it has asked for the modules. A name that the model does not have is changed by transformers' own rules for
    the model; otherwise it means the only module with the same last parts, the number of the layer included. The
    tensors have to agree with it in the end.

    Args:
        record: module name -> anything.
        model: the base model.
    """
    modules = [name for name, _ in model.named_modules()]
    known = set(modules)
    unknown = [name for name in record if name not in known]
    if not unknown:
        return dict(record)
    rules = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    new = {}
    for name in unknown:
        by_rules = rename_source_key(f"{name}.weight", renamings, [])[0].rpartition(".")[0]
        new[name] = by_rules if by_rules in known else _only_module_like(name, modules)
    return {new.get(name) or name: entry for name, entry in record.items()}


def _only_module_like(name: str, modules: Sequence[str]) -> str | None:
    """The only module whose name ends with the most parts of a name; None if there is none, or several."""
    number = re.search(r"(^|\.)\d+\.", name)
    for suffix in suffixes(name):
        if number and not re.search(r"(^|\.)\d+\.", suffix):
            break
        found = [module for module in modules if f".{module}".endswith(f".{suffix}")]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def given_channels(config: ActConfig) -> Mapping[str, Any]:
    """The channels that the user selected; for an adapter that is being loaded, the record of its modules."""
    if config.channels is None:
        return config.adapted_modules or {}
    return read_mask(config.channels)


def read_mask(channels: Any) -> Any:
    """Read the channels of a configuration if they are the path of a saved mask."""
    return ChannelMask.load(channels) if isinstance(channels, (str, os.PathLike)) else channels


def _stored_counts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Module name -> number of channels that an adapter's state dict holds for it."""
    counts: dict[str, int] = {}
    for key, tensor in state_dict.items():
        module, found, tensor_name = key.rpartition("." + PREFIX)
        if found:
            name = module.removeprefix(COMPILED)
            counts[name] = max(counts.get(name, 0), tensor.numel() if tensor_name.startswith("index") else 0)
    return counts


def _index_for(
    name: str,
    config: ActConfig,
    channels: Mapping[str, Any],
    stored: Mapping[str, int] | None,
    module: nn.Module,
) -> torch.Tensor | None:
    """The channels of one target module, checked; None if none are selected."""
    if stored is not None:
        return _placeholder(name, stored[name], num_channels(inner_layer(module)))
    if config.channels is None:
        recorded = channels[name]["selected"] if name in channels else 0  # a renamed module: its tensors will tell
        return _placeholder(name, recorded, num_channels(inner_layer(module)))
    entry = matching_key(name, channels)
    if entry is None or not len(channels[entry]):
        return None
    count = num_channels(inner_layer(module))
    if isinstance(channels, ChannelMask) and channels.num_channels[entry] != count:
        raise ActValueError(
            f"{name}: the mask counts {channels.num_channels[entry]} channels, the module has {count} "
            "(the mask was made for another model)"
        )
    return checked_indices(name, channels[entry], count)


def _check_kind(name: str, module: nn.Module, model: nn.Module) -> None:
    plain = inner_layer(module)
    if channel_kind(plain) is None:
        method = quantization_method(getattr(model, "config", None))
        quantized = "" if method is None else f"the model is quantized ({method}): take the original one, or "
        raise ActTypeError(
            f"{name}: {type(plain).__name__} is not supported, expected Linear (quantized or not), Conv1D, Embedding "
            f"or a norm ({quantized}leave it out with exclude_modules=[{name!r}])"
        )


def _placeholder(name: str, num_selected: int, count: int) -> torch.Tensor:
    if not 0 <= num_selected <= count:
        raise ActValueError(
            f"{name}: the adapter has {num_selected} channels, the module {count} (it was made for another model)"
        )
    return unknown_index(num_selected)
