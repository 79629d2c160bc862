"""Weights that accelerate keeps away from their modules: in CPU memory or on the disk (`device_map`, `cpu_offload`).

Such a module has its weights only while it runs. In between they are on the meta device, without data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn

from act_peft.doors import align_module_device, has_offloaded_params
from act_peft.errors import ActValueError
from act_peft.shards import whole


def values_of(module: nn.Module, part: str, *, name: str = "") -> torch.Tensor:
    """A parameter of a plain module, detached, wherever its values are.

    Where accelerate keeps it elsewhere, it comes from there, on the CPU. Where this process holds a part, the whole is
    gathered, and all processes must call this.

    Args:
        module: the module that owns the parameter.
        part: its name in the module.
        name: name of the module, for the message.

    Raises:
        ActValueError: it has no data anywhere.
    """
    tensor = cast(torch.Tensor, getattr(module, part))
    if tensor.device.type != "meta":
        return whole(tensor)
    if not has_offloaded_params(module):
        raise ActValueError(
            f"{name or type(module).__name__}: its {part} has no data (device meta), expected a loaded model (load it "
            "with its weights)"
        )
    return cast(torch.Tensor, module._hf_hook.weights_map[part]).detach()  # type: ignore[union-attr, index]


def has_data(module: nn.Module) -> bool:
    """Whether the weight of a module is in it."""
    return cast(torch.Tensor, module.weight).device.type != "meta"


def keeps_elsewhere(module: nn.Module) -> bool:
    """Whether accelerate takes the weights of a module away whenever it does not run."""
    return bool(has_offloaded_params(module))


def has_values(module: nn.Module) -> bool:
    """Whether `values_of` gives the weight of a module."""
    return has_data(module) or has_offloaded_params(module)


@contextmanager
def brought_in(*modules: nn.Module) -> Iterator[None]:
    """Inside, modules have their parameters on the device that they run on; for those that nobody calls."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield
