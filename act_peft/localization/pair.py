"""PEFT models and adapters as base or donor.

A PEFT model is base and donor in one: its adapters are switched off for the forwards of the base. An adapter in a
folder, and scores that need merged weights, get a second tree of modules over the same tensors (`twin`). The adapter
is loaded or merged there. The user's modules are not written to.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Container, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from act_peft.adapter.config import ActConfig
from act_peft.adapter.file import CONFIG, TENSORS
from act_peft.adapter.models import record_in_memory
from act_peft.channels.origin import ModelRecord, Origin
from act_peft.disk.checkpoint import read_json
from act_peft.disk.locations import Location, lasting_name, open_location
from act_peft.disk.shard import Shard
from act_peft.doors import MISSING_WARNING, OUTER
from act_peft.errors import ActError, ActTypeError, ActValueError
from act_peft.localization.foreign_config import check_foreign_config_
from act_peft.peft_modules import (
    _MODELS,
    _WRAPPERS,
    NamedModule,
    SwitchedOff,
    has_adapters,
    named_modules,
    plain_layer,
    plain_name,
    runnable,
    without_wrapper,
)

# With this start PEFT computes the adapter from the base's weights and subtracts it from them in place.
_IN_PLACE = "olora"
_OF_CLASS = object()  # in a copy: the place of a `forward` that gives way to the one of the class

Donor = nn.Module | str | os.PathLike[str]


def open_pair(base: nn.Module, donor: Donor, *, merged: bool) -> tuple[nn.Module, nn.Module]:
    """Base and donor as two models, from the arguments of `localize`.

    Args:
        base: a model; a PEFT model counts with its active adapters, unless the donor is the same model.
        donor: a model; a PEFT model on `base` (the base is then the model with its adapters off); the folder or Hub id
            of a PEFT adapter of `base`.
        merged: whether adapters are merged, so that both models have plain layers with comparable weights. Changed
            weights are then new tensors.

    Returns:
        Base and donor. They share tensors with the arguments and with each other, so they are only for reading.

    Raises:
        ActTypeError: neither model nor path.
        ActValueError: an adapter that cannot be loaded or switched off.
    """
    if not isinstance(base, nn.Module):
        raise ActTypeError(f"base: got {type(base).__name__}, expected a torch.nn.Module (load the model first)")
    base = runnable(base)
    donor = runnable(donor) if isinstance(donor, nn.Module) else donor
    if isinstance(donor, (str, os.PathLike)):
        donor = _load_adapter(base, os.fspath(donor))
    elif not isinstance(donor, nn.Module):
        raise ActTypeError(
            f"donor: got {type(donor).__name__}, expected a torch.nn.Module, or the folder or Hub id of an adapter"
        )
    elif without_wrapper(base) is without_wrapper(donor):
        adapted = donor if isinstance(donor, _MODELS) else base
        if isinstance(adapted, _MODELS):
            _check_switch(adapted)
            return (_without_adapters(adapted), _merged(adapted)) if merged else (SwitchedOff(adapted), adapted)
    return (_merged(base), _merged(donor)) if merged else (base, donor)


def origin_of_pair(base: nn.Module, donor: Donor, names: Container[str]) -> Origin:
    """The record of base and donor, from the same arguments as `open_pair`.

    An adapter has no weights of its own to recognize it by; of a base without its adapters the plain weights count.

    Args:
        base: the base.
        donor: the donor.
        names: the modules of which fingerprints are taken.
    """
    is_own = isinstance(donor, nn.Module) and without_wrapper(base) is without_wrapper(donor)
    if not isinstance(donor, nn.Module):
        return Origin(base_record(base, names, as_base=is_own), ModelRecord(lasting_name(donor)))
    return Origin(base_record(base, names, as_base=is_own), ModelRecord() if is_own else donor_record(donor, names))


def base_record(base: nn.Module, names: Container[str], *, as_base: bool = False) -> ModelRecord:
    """The record of a base.

    Args:
        base: the base.
        names: the modules of which fingerprints are taken.
        as_base: whether the base counts without its adapters.
    """
    return record_in_memory(base, _named(base, names), as_base=as_base)


def donor_record(donor: nn.Module, names: Container[str]) -> ModelRecord:
    """The record of a donor in memory; an empty one if it has adapters."""
    return ModelRecord() if has_adapters(donor) else base_record(donor, names)


def _named(model: nn.Module, names: Container[str]) -> list[tuple[str, NamedModule]]:
    return [(name, module) for name, module in named_modules(model) if name in names]


def beside(model: nn.Module, location: str | os.PathLike[str]) -> nn.Module:
    """The base of a model with another adapter on it.

    Args:
        model: a model, with adapters of its own or without.
        location: folder or Hub id of a PEFT adapter of the model's base.

    Returns:
        A model of its own that shares the base's tensors.

    Raises:
        ActValueError: an adapter that cannot be loaded; the model has merged adapters.
    """
    if any(getattr(module, "merged", False) for module in model.modules() if isinstance(module, _WRAPPERS)):
        raise ActValueError(
            "the model has merged adapters, expected none (call unmerge_adapter(), then the base can be read)"
        )
    base = _without_adapters(without_wrapper(model))
    vars(base).pop("peft_config", None)  # PEFT would take it for an adapted model
    return _load_adapter(base, os.fspath(location))


def twin(model: nn.Module, *, own: Container[str] = ()) -> nn.Module:
    """A second tree of modules over the same tensors, with parameters and attributes of its own. It shares the hooks.

    To give a parameter of the twin new values, replace it: writing into it would change the model.

    Args:
        model: the model.
        own: names of parameters that get tensors of their own.

    Raises:
        ActValueError: a module whose `forward` was replaced by a function that holds modules of the model. TRL's
            trainers replace it too; the copy has its class's `forward` then.
    """
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) is not nn.Parameter:  # quantized ones hold more than their tensor
            memo.setdefault(id(parameter), parameter)
        elif id(parameter) not in memo or name in own:
            values = parameter.detach().clone() if name in own else parameter.detach()
            memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if _is_of_trl(forward):
            memo[id(forward)] = _OF_CLASS
        elif forward is not None and not _follows_a_copy(forward, module):
            raise ActValueError(
                f"{name or type(module).__name__}: its forward was replaced by one that a copy cannot take along "
                "(accelerate does that to spread a model over devices), expected a model as it was loaded, because it "
                "has to be copied here (load it anew, on one device; for scores by activations, an adapter can also "
                "be a PeftModel on this base)"
            )
        memo.update({id(buffer): buffer for buffer in module._buffers.values() if buffer is not None})
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            memo.update({id(hook): hook for hook in hooks.values()})
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if vars(module).get("forward") is _OF_CLASS:
            del module.forward
    return copied


def _is_of_trl(forward: object) -> bool:
    """Whether a TRL trainer put this `forward` there. It adds a loss and is otherwise the class's own."""
    function = getattr(forward, "__func__", forward)
    return str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0] == "trl"


def _follows_a_copy(forward: object, module: nn.Module) -> bool:
    """Whether a replaced `forward` is a method of the module alone, which a deep copy binds to the copied module."""
    return isinstance(forward, MethodType) and forward.__self__ is module and not _holds_modules(forward.__func__, [])


def _holds_modules(function: Any, seen: list[Any]) -> bool:
    """Whether a function keeps a module, or a method of one, in its closure or in what it wraps."""
    if any(function is other for other in seen):
        return False
    seen.append(function)
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    return any(
        isinstance(value, nn.Module)
        or isinstance(getattr(value, "__self__", None), nn.Module)
        or (isinstance(value, FunctionType) and _holds_modules(value, seen))
        for value in (*cells, *getattr(function, "__dict__", {}).values())
    )


def _load_adapter(base: nn.Module, location: str) -> nn.Module:
    """A twin of the base with the adapter. Tensors of the base that the adapter file holds too are new tensors."""
    if has_adapters(base):
        raise ActValueError(
            f"donor: {location} is an adapter, but the base has adapters of its own, expected the plain model that "
            "the adapter was made for (load it anew, or take base.merge_and_unload())"
        )
    place = open_location(location, expected=f"an adapter ({CONFIG})", files=[CONFIG, TENSORS])
    folder = place.folder
    if not (folder / CONFIG).is_file():
        raise ActValueError(
            f"donor: {location} has no {CONFIG}, expected the folder or Hub id of an adapter (load a whole model, for "
            "example with AutoModelForCausalLM.from_pretrained, and pass the model)"
        )
    try:
        config = _read_config(place)
        _check_kind(config, location)
        with Shard(place.file(TENSORS)) as shard:  # PEFT writes biases and resized embeddings into the model
            check_foreign_config_(config, [name for name, _ in base.named_modules()], shard)
            donor = twin(base, own={plain_name(key.removeprefix(OUTER)) for key in shard.tensors})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=MISSING_WARNING)  # PEFT would go on with random numbers
            return PeftModel.from_pretrained(donor, str(folder), config=config, is_trainable=False)
    except ActError:
        raise
    except Exception as error:  # a damaged file fails anywhere inside PEFT
        raise ActValueError(
            f"donor: {location} cannot be loaded as an adapter of the base, expected an adapter that was made for it "
            f"({str(error)[:300]})"
        ) from error


def _read_config(place: Location) -> PeftConfig:
    """The configuration of an adapter of any method, by our own reader of JSON."""
    content = read_json(place.folder, CONFIG)
    if content.get("peft_type") == "ACT":
        return cast(PeftConfig, ActConfig.from_pretrained(str(place.folder)))
    return cast(PeftConfig, PeftConfig.from_peft_type(**content))


def _check_kind(config: PeftConfig, location: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ActValueError(
            f"donor: {location} is an adapter of type {kind}, expected one that changes modules, as LoRA does (the "
            "model would see other tokens than the base)"
        )
    if getattr(config, "init_lora_weights", None) == _IN_PLACE:
        raise ActValueError(
            f"donor: {location} starts from init_lora_weights={_IN_PLACE!r}, expected another start (such an adapter "
            "rewrites the base when it is loaded: load it on a second copy of the base and pass that model)"
        )


def _check_switch(model: PeftModel | PeftMixedModel) -> None:
    """Check that the model without its adapters is the base, and with them the donor."""
    where = "donor: the PEFT model"
    if not isinstance(model.base_model, BaseTuner):
        raise ActValueError(
            f"{where} is of a type that changes no modules, expected one that does, as LoRA "
            "(prompts make the model see other tokens than the base)"
        )
    layers = [module for module in model.modules() if isinstance(module, _WRAPPERS)]
    if all(layer.disable_adapters for layer in layers):
        raise ActValueError(f"{where} has no active adapter, expected one (call set_adapter, leave disable_adapter())")
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ActValueError(
            f"{where} has merged adapters, expected none (call unmerge_adapter(), then they can be switched off)"
        )
    configs = cast(Mapping[str, PeftConfig], model.peft_config)
    biased = [name for name in model.active_adapters if getattr(configs[name], "bias", "none") != "none"]
    if biased:
        raise ActValueError(
            f"{where} has trained biases in adapter {biased[0]!r}, expected bias='none' (they cannot be switched off: "
            "load the base anew and pass the adapter's folder as donor)"
        )


def _without_adapters(model: nn.Module) -> nn.Module:
    """A twin of the model with plain modules in place of PEFT's."""
    copied = without_wrapper(twin(model))
    for module in list(copied.modules()):
        if not isinstance(module, _WRAPPERS):
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = plain_layer(child)
    return copied


def _merged(model: nn.Module) -> nn.Module:
    """A model with plain layers: the model itself, or a twin with merged adapters if it has adapters."""
    if not has_adapters(model):
        return without_wrapper(model)
    if not isinstance(model, _MODELS) or not isinstance(model.base_model, BaseTuner):
        raise ActValueError(
            f"{type(model).__name__}: has adapters that cannot be merged here, expected a PeftModel or a plain model "
            "(merge them and pass the merged model)"
        )
    copied = twin(model)
    for _, found in named_modules(copied):
        if found.called is not found.layer:
            for part in found.layer.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:  # merging writes in place
                        part._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return cast(BaseTuner, copied.base_model).merge_and_unload()
