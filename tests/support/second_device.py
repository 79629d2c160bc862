"""A second device, `other`, in a process with a CPU only: real numbers, and an error where devices meet.

Importing this module registers it with torch for the whole process, so tests on it run in one of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

OTHER = "other"
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OtherTensor(torch.Tensor):
    """A tensor on `other`. It holds one on the CPU, which operations work on."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OtherTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            dtype=held.dtype,
            device=f"{OTHER}:0",
            storage_offset=held.storage_offset(),
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"OtherTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if function not in _COPIES and not isinstance(tensor, OtherTensor) and tensor.dim():
                raise RuntimeError(f"{function}: a tensor {list(tensor.shape)} on the CPU among those on {OTHER}")
        target = kwargs.get("device") if function in _COPIES else None
        to_cpu = target is not None and torch.device(target).type == "cpu"
        result = function(*pytree.tree_map(_held, args), **pytree.tree_map(_held, kwargs))

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or to_cpu:
                return value
            written = [tensor for tensor in tensors if isinstance(tensor, OtherTensor) and tensor.held is value]
            return written[0] if written else OtherTensor(value)

        if function is torch.ops.aten.copy_.default:
            return args[0]
        return pytree.tree_map(wrapped, result)


def _held(value: Any) -> Any:
    if isinstance(value, OtherTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _empty(size: Any, *, dtype: Any = None, **settings: Any) -> torch.Tensor:
    return OtherTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **settings: Any) -> torch.Tensor:
    return OtherTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


_setup_privateuseone_for_python_backend(OTHER)
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
