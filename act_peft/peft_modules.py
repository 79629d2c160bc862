"""The modules of a model under the names that they have without PEFT's wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

_MODELS = (PeftModel, PeftMixedModel)


_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@dataclass(frozen=True)
class NamedModule:
    """A module under the name that it has without PEFT.

    Attributes:
        called: the module whose output is the module's: a wrapper where PEFT has wrapped it.
        layer: the plain layer inside, otherwise the same.
    """

    called: nn.Module
    layer: nn.Module


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that the user gave to PEFT; any other model as it is."""
    return model.get_base_model() if isinstance(model, _MODELS) else model


def plain_layer(module: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrappers, otherwise the module itself."""
    while isinstance(module, _WRAPPERS):
        module = _unwrapped(module)
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, NamedModule]]:
    """As `model.named_modules()` would be without PEFT: no prefix, no wrappers, nothing that belongs to an adapter."""
    yield from _walk(without_wrapper(model), "", set())


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return cast(AuxiliaryTrainingWrapper, module).original_module


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
