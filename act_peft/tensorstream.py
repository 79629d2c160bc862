"""A safetensors file that is written tensor by tensor, so that its tensors are never in memory together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from act_peft.shards import DTYPES

# Name -> dtype and shape, in the order of the file.
TensorInfos = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def size_of(infos: TensorInfos) -> int:
    """Bytes of all tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in infos.values())


def write_tensors(path: Path, infos: TensorInfos, tensors: Iterable[torch.Tensor]) -> None:
    """Write a new file.

    Args:
        path: a file that does not exist yet.
        infos: what stands in the header. Wide dtypes come first, so that every tensor begins at a multiple of its
            own size.
        tensors: the tensors in this order, on the CPU; each is written before the next is asked for.
    """
    with open(path, "xb") as file:
        file.write(_header(infos))
        for tensor in tensors:
            # A single element counts as contiguous whatever its stride; bytes can be viewed with stride 1 only.
            flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)


def _header(infos: TensorInfos) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in infos.items():
        start, end = end, end + size_of({key: (dtype, shape)})
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
