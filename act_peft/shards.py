"""Parameters of which this process holds a part: their shapes, and how they are read and written as a whole.

| kind | how it shows | its shape | its whole |
|---|---|---|---|
| FSDP2 | a `DTensor` | `shape` | `full_tensor()` |
| DeepSpeed ZeRO 3 | has `ds_id`; `shape` is `[0]` | `ds_shape` | inside `deepspeed.zero.GatheredParameters` |

To read or write a whole parameter is a collective operation: all processes do it at the same time.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO 3 has spread this parameter over the processes."""
    return hasattr(tensor, "ds_id")


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the parameter."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The values of the whole parameter, without gradient; its own memory if this process has all of it."""
    if isinstance(tensor, DTensor):
        return cast(Any, tensor.detach()).full_tensor()
    if not is_partitioned(tensor):
        return tensor.detach()
    with _gathered([tensor]):
        return tensor.detach().clone()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this process holds, without gradient, to be read or written in place."""
    return cast(Any, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def write_rows_(tensor: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, dim: int) -> None:
    """Overwrite rows of the whole parameter; every process gives the same rows.

    Args:
        tensor: a parameter.
        index: int64 `[K]`.
        rows: the new values, K along `dim`, in the parameter's dtype.
        dim: the axis.
    """
    if isinstance(tensor, DTensor):
        spread: Any = tensor.detach()
        full = spread.full_tensor().index_copy_(dim, index, rows)
        part = distribute_tensor(full, spread.device_mesh, spread.placements, src_data_rank=None)
        spread.to_local().copy_(part.to_local())
    elif is_partitioned(tensor):
        with _gathered([tensor], modifier_rank=0):
            tensor.data.index_copy_(dim, index, rows)
    else:
        tensor.data.index_copy_(dim, index, rows)


def is_tensor_parallel(module: nn.Module, model: nn.Module) -> bool:
    """Whether several processes compute one output of a module together, each with a part of its weight.

    Args:
        module: a module without adapters.
        model: the model that it is in.
    """
    if getattr(module, "_hf_tp_plan", None) is not None:  # transformers before 5.17
        return True
    weight = module._parameters.get("weight")
    if not isinstance(weight, DTensor):
        return False
    if "tp" in (weight.device_mesh.mesh_dim_names or ()):
        return True
    return not any(isinstance(part, FSDPModule) for part in model.modules())


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP1 has put the parameters of a model into flat ones."""
    return any(isinstance(part, FullyShardedDataParallel) for part in model.modules())


def needs_every_process(model: nn.Module) -> bool:
    """Whether a forward pass of the model gathers parameters, so that all processes have to run it equally often."""
    return is_flattened(model) or any(is_shared_out(parameter) for parameter in model.parameters())


def reshard_(model: nn.Module) -> None:
    """Let FSDP2 drop the whole parameters that it keeps after a forward pass, so that what is written stays."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathering(*models: nn.Module) -> Iterator[None]:
    """Inside the context models run although ZeRO 3 has spread their parameters and no engine gathers them yet.

    Every module's own parameters are gathered while it runs. Of other models nothing changes.
    """
    handles, opened = [], {}

    def gather(module: nn.Module, _: Any) -> None:
        opened[module] = _gathered(list(module.parameters(recurse=False)))
        opened[module].__enter__()

    def release(module: nn.Module, *_: Any) -> None:
        if module in opened:
            opened.pop(module).__exit__(None, None, None)

    for module in {module for model in models for module in model.modules()}:
        if any(map(is_partitioned, module.parameters(recurse=False))) and type(module._parameters) is dict:
            handles.append(module.register_forward_pre_hook(gather))
            handles.append(module.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unflattened(*models: nn.Module) -> Iterator[None]:
    """Inside the context modules inside FSDP1 have their own parameters, whole and only for reading."""
    with ExitStack() as stack:
        for model in models:
            if is_flattened(model):
                stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False))
        yield


@contextmanager
def _gathered(tensors: Sequence[torch.Tensor], *, modifier_rank: int | None = None) -> Iterator[None]:
    deepspeed = cast(Any, importlib.import_module("deepspeed"))  # it is there: it has made these parameters
    with deepspeed.zero.GatheredParameters(list(tensors), modifier_rank=modifier_rank):
        yield
