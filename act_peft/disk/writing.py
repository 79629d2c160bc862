"""Writing safetensors files: the header, tensor after tensor, or many pieces of memory in one call.

`GatheringWriter` writes changed rows between the unchanged rows of a mapped file, without a copy in memory. It hands
up to a thousand pieces to the system in one call (`writev`), because a call for each row would cost more than the
rows. With the reads of `shard.py` this makes merging about as quick as `cp`: see `tests/benchmarks/bench_merge.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from act_peft.disk.shard import BITS, DTYPES, Shard, TensorInfo

_AT_ONCE = 1000  # pieces in one call; POSIX systems accept 1024
_WAITING = 16 << 20  # bytes that are collected before a write
_HAS_WRITEV = hasattr(os, "writev")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GatheringWriter:
    """Writes a file, or a part of it, from front to back; a context manager.

    The pieces are not copied, and many are written at a time. Do not change them before the block ends.

    Args:
        path: a file that does not exist yet; with `start`, an existing file.
        start: first byte to write. Several writers may fill different parts of one file.

    Raises:
        OSError: if the system refuses a write.
    """

    def __init__(self, path: str | os.PathLike[str], *, start: int | None = None) -> None:
        self._file = open(path, "xb" if start is None else "r+b", buffering=0)  # noqa: SIM115 (closed by `__exit__`)
        self._file.seek(start or 0)
        self._pieces: list[memoryview] = []
        self._waiting = 0

    def __enter__(self) -> GatheringWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
        finally:
            self._pieces.clear()
            self._file.close()

    def write(self, data: bytes | memoryview | torch.Tensor) -> None:
        """Add bytes, or the bytes of a contiguous tensor on the CPU."""
        piece = _bytes_of(data) if isinstance(data, torch.Tensor) else memoryview(data)
        self._pieces.append(piece)
        self._count(len(piece))

    def write_with_rows(self, block: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Add a block in which some rows are replaced.

        Args:
            block: `[N, ...]`, contiguous.
            index: int64 `[K]`, ascending, in `[0, N)`.
            rows: `[K, ...]`, contiguous, in the dtype of `block`.
        """
        self._pieces.extend(piece for piece in _interleaved(block, index.numpy(), rows) if len(piece))
        self._count(block.numel() * block.element_size())

    def _count(self, size: int) -> None:
        self._waiting += size
        if self._waiting >= _WAITING or len(self._pieces) >= _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        for first in range(0, len(pieces), _AT_ONCE):
            self._write_all(pieces[first : first + _AT_ONCE])

    def _write_all(self, pieces: list[memoryview]) -> None:
        while pieces:
            written = os.writev(self._file.fileno(), pieces) if _HAS_WRITEV else self._file.write(pieces[0])
            done = 0  # whole pieces; a disk that fills up accepts a part of them
            while done < len(pieces) and written >= len(pieces[done]):
                written -= len(pieces[done])
                done += 1
            pieces = pieces[done:]
            if written:
                pieces[0] = pieces[0][written:]


def _interleaved(block: torch.Tensor, where: np.ndarray, rows: torch.Tensor) -> Iterator[memoryview]:
    """Ranges of `block` and `rows` in turns; neighbouring rows are one range."""
    old, new = _bytes_of(block), _bytes_of(rows)
    width = len(old) // len(block) if len(block) else 0
    breaks = np.flatnonzero(where[1:] != where[:-1] + 1) + 1
    edges = np.concatenate(([0], breaks, [len(where)])) if len(where) else np.zeros(1, np.int64)
    position = 0
    for first, stop, place in zip(
        (edges[:-1] * width).tolist(), (edges[1:] * width).tolist(), (where[edges[:-1]] * width).tolist(), strict=True
    ):
        yield old[position:place]
        yield new[first:stop]
        position = place + stop - first
    yield old[position:]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(_INTEGERS[tensor.element_size()]).numpy().reshape(-1).data.cast("B")


# Name -> dtype and shape, in the order of the file.
TensorInfos = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def size_of(infos: TensorInfos) -> int:
    """Bytes of all tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in infos.values())


def write_tensors(
    path: Path,
    infos: TensorInfos,
    tensors: Iterable[torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file.

    Args:
        path: a file that does not exist yet.
        infos: the entries of the header. Wide dtypes come first, so that every tensor begins at a multiple of its
            item size.
        tensors: the tensors in this order, on the CPU. Each is written before the next is asked for.
        metadata: of the header; by default that of torch's files.
    """
    places, end = {}, 0
    for key, (dtype, shape) in infos.items():
        start, end = end, end + size_of({key: (dtype, shape)})
        places[key] = TensorInfo(_NAMES[dtype], shape, start, end)
    with open(path, "xb") as file:
        file.write(_header(places, metadata or {"format": "pt"}, data_start=0))
        for tensor in tensors:
            # A single element counts as contiguous whatever its stride; only stride 1 can be viewed as bytes.
            flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)


def header_with(shard: Shard, new: Mapping[str, TensorInfo]) -> tuple[bytes, list[str]]:
    """The bytes before the data of a file that holds more tensors, or some of other sizes.

    Args:
        shard: the file as it is.
        new: name -> dtype and shape of the new tensors, and of those that change; where they lie says nothing.

    Returns:
        The bytes; and the names in the order in which the data have to follow. Wide dtypes come first, so that every
        tensor begins at a multiple of its item size.
    """
    infos = {**dict(sorted(shard.tensors.items(), key=lambda item: item[1].start)), **new}
    order = sorted(infos, key=lambda name: -BITS[infos[name].dtype])
    places, end = {}, 0
    for name in order:
        start, end = end, end + infos[name].stop - infos[name].start
        places[name] = replace(infos[name], start=start, stop=end)
    return _header(places, shard.metadata, data_start=0), order


def _header(places: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, data_start: int) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, info in places.items():
        offsets = [info.start - data_start, info.stop - data_start]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
