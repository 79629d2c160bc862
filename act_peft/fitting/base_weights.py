"""The weights of the base that a transfer was fitted for, where they can be reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from act_peft.adapter.base_record import Fingerprint
from act_peft.adapter.models import record_of
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.origin import check_models
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActTypeError, ActValueError
from act_peft.fitting.module import FitRecord, FittedModule, Modules
from act_peft.peft_modules import without_wrapper
from act_peft.transfer.parameters import ModelTensors

Base = nn.Module | str | os.PathLike[str]
_BLOCK = 1 << 12  # rows that are hashed at a time


@contextmanager
def opened_base(base: Base, modules: Modules) -> Iterator[Parameters]:
    """The parameters of a base, in memory or on disk, by the names that the modules have.

    Args:
        base: a model, with or without adapters; or the folder or Hub id of a checkpoint.
        modules: those that will be asked for.

    Raises:
        ActTypeError: neither a model nor a path.
        ActValueError: no such checkpoint; a base that lacks one of the modules, or has another shape there.
    """
    names = [f"{name}.{part}" for module in modules.values() for name in module.names for part in ("weight", "bias")]
    if isinstance(base, nn.Module):
        parameters = Parameters(ModelTensors(without_wrapper(base)), names)
        _check(parameters, modules)
        yield parameters
    elif isinstance(base, (str, os.PathLike)):
        with Checkpoint.open(base) as checkpoint:
            parameters = Parameters(checkpoint, names)
            _check(parameters, modules)
            yield parameters
    else:
        raise ActTypeError(
            f"base: got {type(base).__name__}, expected a model, or the folder or Hub id of a checkpoint"
        )


def differing_modules(parameters: Parameters, modules: Modules, record: FitRecord) -> list[str]:
    """The modules whose weights are others than those that the change was fitted for.

    Raises:
        ActValueError: they are those of a donor.
    """
    differing = [
        name for name, module in modules.items() if weight_fingerprint(parameters, name, module) != module.fingerprint
    ]
    if differing:
        _refuse_donor(parameters, record)
    return differing


def refuse_donor(model: nn.Module, record: FitRecord) -> None:
    """Check that a model is not a donor of a transfer.

    Raises:
        ActValueError: it is.
    """
    tensors = ModelTensors(without_wrapper(model))
    _refuse_donor(Parameters(tensors, tensors.names), record)


def _refuse_donor(parameters: Parameters, record: FitRecord) -> None:
    for origin in record.origins:
        check_models(origin, base=record_of(parameters, origin.modules), what="the transfer")


def rows_of(parameters: Parameters, name: str, module: FittedModule, rows: torch.Tensor) -> torch.Tensor:
    """Some channels of the base's weight (tokens of an embedding), in the module's orientation, on the CPU."""
    return parameters.rows(f"{name}.weight", rows, 1 if module.kind is ChannelKind.CONV1D else 0).cpu()


def _check(parameters: Parameters, modules: Modules) -> None:
    shapes = {name: tuple(module.weight_change().shape) for name, module in modules.items()}
    parameters.check_unquantized({f"{name}.weight": shape for name, shape in shapes.items()})
    for name, module in modules.items():
        shape = shapes[name]
        found = parameters.shape(f"{name}.weight") if f"{name}.weight" in parameters else None
        if found != shape:
            got = "no such module" if found is None else f"a weight {list(found)}"
            raise ActValueError(
                f"{name}: {parameters.location} has {got}, the transfer was fitted for a weight {list(shape)} (take "
                "the base that it was fitted for)"
            )
        if module.bias is not None and f"{name}.bias" not in parameters:
            raise ActValueError(
                f"{name}: {parameters.location} has no bias, the transfer was fitted for a base with one"
            )


def weight_fingerprint(parameters: Parameters, name: str, module: FittedModule) -> str:
    """Fingerprint of the base's weight, row by row of channels, and bias."""
    whole = Fingerprint()
    is_conv1d = module.kind is ChannelKind.CONV1D
    for start in range(0, len(module.delta), _BLOCK):
        rows = parameters.rows(
            f"{name}.weight", torch.arange(start, min(start + _BLOCK, len(module.delta))), 1 if is_conv1d else 0
        )
        whole.add(rows.T if is_conv1d else rows)
    if module.bias is not None:
        whole.add(parameters.rows(f"{name}.bias", torch.arange(len(module.bias)), 0))
    return whole.result()
