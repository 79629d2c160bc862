"""Wrappers in a model, those of PEFT, of parallel training and of `torch.compile`: names and modules without them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from act_peft.doors import CHECKPOINTED, COMPILED_MODULE, FLATTENED

_MODELS = (PeftModel, PeftMixedModel)
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_AROUND = (COMPILED_MODULE, FLATTENED, CHECKPOINTED)


@dataclass(frozen=True)
class NamedModule:
    """A module under the name that it has without PEFT.

    Attributes:
        called: the module whose output is the module's: a wrapper where PEFT has wrapped it.
        layer: the plain layer inside, otherwise the same.
    """

    called: nn.Module
    layer: nn.Module


@contextmanager
def same_gradients(model: nn.Module) -> Iterator[None]:
    """Afterwards the same parameters train as before; PEFT lets all active adapters train when it switches them on."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad_(required)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the context PEFT's wrappers in a model run the original modules; afterwards they are as before."""
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, _WRAPPERS)]
    on = [wrapper for wrapper in wrappers if not wrapper.disable_adapters]
    with same_gradients(model):
        try:
            for wrapper in on:
                wrapper.enable_adapters(False)
            yield
        finally:
            for wrapper in on:
                wrapper.enable_adapters(True)


class SwitchedOff(nn.Module):
    """A PEFT model as its base: every call runs with the adapters off. It has the model's own modules, no copies.

    Args:
        model: the PEFT model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the base."""
        with switched_off(self.model):
            return self.model(*args, **kwargs)


def runnable(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, DeepSpeed's engine and `torch.compile`.

    It gives the same outputs, without what these do beside (sending buffers around, running compiled code that does
    not call hooks). FSDP1 stays, because it gathers the parameters.
    """
    while True:
        engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", ())
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, engine)):
            model = cast(nn.Module, model.module)
        elif COMPILED_MODULE in model._modules:
            model = cast(nn.Module, model._modules[COMPILED_MODULE])
        else:
            return model


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that the user gave to PEFT or to parallel training; any other model as it is."""
    model = _inside(runnable(model.model if isinstance(model, SwitchedOff) else model))
    return _inside(model.get_base_model()) if isinstance(model, _MODELS) else model


def _inside(module: nn.Module) -> nn.Module:
    """The module inside what FSDP1, activation checkpointing and `torch.compile` put around it."""
    while (name := next((name for name in _AROUND if name in module._modules), None)) is not None:
        module = cast(nn.Module, module._modules[name])
    return module


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has wrapped a module of the model."""
    return any(isinstance(module, _WRAPPERS) for module in model.modules())


def inner_layer(module: nn.Module) -> nn.Module:
    """The module that an adapter layer wraps, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def plain_layer(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, PEFT's around modules that are trained as a whole included."""
    module = _inside(module)
    while isinstance(module, _WRAPPERS):
        module = inner_layer(module) if isinstance(module, BaseTunerLayer) else cast(Any, module).original_module
        module = _inside(module)
    return module


def plain_name(name: str) -> str:
    """The name that a parameter has without PEFT's wrappers."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def named_modules(model: nn.Module) -> Iterator[tuple[str, NamedModule]]:
    """As `model.named_modules()` would be without wrappers: no prefix, nothing that belongs to an adapter."""
    with switched_off(model) if isinstance(model, SwitchedOff) else nullcontext():
        found = list(_walk(without_wrapper(model), "", set()))
    yield from found


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, NamedModule]]:
    if id(module) in seen:
        return
    layer = plain_layer(module)
    seen |= {id(module), id(layer)}
    yield name, NamedModule(module, layer)
    inside = _saved_copy(module) or layer
    for child_name, child in inside._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _saved_copy(module: nn.Module) -> nn.Module | None:
    """What runs in place of a module that is trained as a whole (`modules_to_save`)."""
    if not isinstance(module, ModulesToSaveWrapper) or module.disable_adapters or not module.active_adapters:
        return None
    saved = dict(module.modules_to_save.items())
    return saved.get(module.active_adapters[0])
