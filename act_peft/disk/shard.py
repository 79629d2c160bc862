"""One safetensors file, read as bytes: a checked header, and copies of single rows.

A safetensors file is `u64 length | JSON header | data`. The whole header is checked before anything else is read: no
memory is taken because a damaged header asks for it, and no read leaves the bytes of its tensor. The check needs the
size of a dtype only, so a file may hold tensors that cannot be read. They are refused when somebody asks for them.

The file is mapped in pieces, and the system is told before each read which bytes come next (`_fetch`, `_map_bytes`).
That makes single rows quick on a slow disk and merging about as quick as `cp`. `tests/benchmarks/bench_merge.py`
measures it.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from act_peft.disk.json_text import parse_json
from act_peft.errors import ActTypeError, ActValueError

# The dtypes that can be read -> their torch dtype.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bits of an element for every dtype of safetensors 0.8.
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
BITS |= {"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # weights of these dtypes are ordinary numbers
PLAIN = frozenset(DTYPES[name] for name in PLAIN_DTYPES)
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_DIMS = 8
_MAX_ELEMENTS = 2**40  # more than a terabyte; this also limits the shapes of empty tensors
_MADV_POPULATE_READ = 22  # from the Linux headers; Python has no name for it yet
_WINDOW = 32 << 20  # bytes of a tensor that are mapped at a time


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header: dtype (its safetensors name), shape, first byte in the file, byte after the last."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return (self.stop - self.start) // self.shape[0] if self.shape and self.shape[0] else 0

    @property
    def is_plain(self) -> bool:
        """Whether the values are ordinary floating point numbers, rather than quantized ones."""
        return self.dtype in PLAIN_DTYPES

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges along the first axis of at most some megabytes each."""
        step = max(1, _WINDOW // max(1, self.row_bytes))
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])


class Shard:
    """A safetensors file, open for reading; a `TensorSource`. Every tensor that it returns is a copy.

    Args:
        path: the file.

    Attributes:
        path: the file.
        location: the path as text, for messages.
        tensors: name -> `TensorInfo`, in the order of the header.
        metadata: the metadata in the header.
        data_start: the first byte of the data.
        size: bytes of the file.

    Raises:
        ActValueError: if there is no file, or it is cut off, damaged or of a different format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.location = str(self.path)
        if self.path.exists() and not self.path.is_file():  # opening a pipe would wait for its writer
            raise ActValueError(f"{self.path}: is no regular file, expected a safetensors file (check the path)")
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise ActValueError(
                f"{self.path}: cannot be opened ({error.strerror}), expected a safetensors file (check the path)"
            ) from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header, self.data_start = _read_header(self.path, self._file, self.size)
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.tensors = _checked_tensors(self.path, header, self.data_start, self.size)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors."""
        return tuple(self.tensors)

    @property
    def quantization(self) -> str | None:
        """None: a file does not say it."""
        return None

    def info(self, name: str) -> TensorInfo:
        """The header's entry of a tensor.

        Raises:
            ActValueError: if there is no tensor of this name.
        """
        if name not in self.tensors:
            raise ActValueError(
                f"{self.path}: has no tensor {name!r}, expected one (the file belongs to a different model)"
            )
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            ActValueError: if there is no such tensor, or it has none of `DTYPES`.
        """
        return DTYPES[self._readable(name).dtype]

    def _readable(self, name: str) -> TensorInfo:
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise ActValueError(
                f"{self.path}: {name} is {info.dtype}, expected a tensor of {', '.join(DTYPES)} (the model is "
                "quantized: take the original one)"
            )
        return info

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of a whole tensor."""
        info = self._readable(name)
        if not info.shape:
            return self._result((), info, self._map(info.start, info.stop, info).reshape(()).copy())
        return self.block(name, 0, info.shape[0])

    def block(self, name: str, first: int, stop: int) -> torch.Tensor:
        """A copy of the entries `first` to `stop` along the first axis.

        Raises:
            ActValueError: if the range leaves the tensor.
        """
        info = self._checked_range(name, first, stop)
        shape = (stop - first, *info.shape[1:])
        out = np.empty(shape, _raw_dtype(info))
        for a, b in info.blocks():
            a, b = max(a, first), min(b, stop)
            if a < b:
                out[a - first : b - first] = self._rows_between(info, a, b, whole=True)
        return self._result(shape, info, out)

    def view(self, name: str, first: int, stop: int) -> torch.Tensor:
        """The entries `first` to `stop` along the first axis as a private mapping of the file. Use it at once.

        Raises:
            ActValueError: if the range leaves the tensor.
        """
        info = self._checked_range(name, first, stop)
        raw = self._rows_between(info, first, stop, whole=True)
        return self._result((stop - first, *info.shape[1:]), info, raw)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes `start` to `stop` of the file, as mappings of some megabytes each. Use each at once.

        Raises:
            ActValueError: if the file has become shorter since it was opened.
        """
        for first in range(start, stop, _WINDOW):
            yield self._map_bytes(first, min(first + _WINDOW, stop), whole=True).data

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of some rows (`dim` 0) or columns (`dim` 1) of a tensor.

        Of a tensor's rows, only the pages that hold the selected ones are read.

        Args:
            name: the tensor.
            index: int64 `[K]`, ascending.
            dim: the axis of `index`.

        Returns:
            The tensor's shape with K along `dim`, in its dtype.

        Raises:
            ActValueError: if an index lies outside the tensor, the indices do not ascend, the tensor has no such axis,
                or it has none of `DTYPES`.
            ActTypeError: if the indices are not int64 `[K]`.
        """
        info = self._readable(name)
        self._check_index(name, info, index, dim)
        if index.numel() == info.shape[dim]:
            return self.tensor(name)
        shape = tuple(index.numel() if axis == dim else length for axis, length in enumerate(info.shape))
        out = np.empty(shape, _raw_dtype(info))
        if index.numel():
            where = index.numpy()
            if dim == 0:
                self._fetch(info, where)
            for a, b in info.blocks():
                if dim == 1:
                    window = self._rows_between(info, a, b, whole=True)
                    np.take(window, where, axis=1, out=out[a:b], mode="clip")
                    continue
                i, j = np.searchsorted(where, (a, b))
                if i < j:
                    first, last = int(where[i]), int(where[j - 1]) + 1
                    window = self._rows_between(info, first, last)
                    np.take(window, where[i:j] - first, axis=0, out=out[i:j], mode="clip")
        return self._result(shape, info, out)

    def _checked_range(self, name: str, first: int, stop: int) -> TensorInfo:
        info = self._readable(name)
        if not info.shape or not 0 <= first <= stop <= info.shape[0]:
            raise ActValueError(
                f"{self.path}: {name}: got rows {first} to {stop}, expected a range in the shape {list(info.shape)}"
            )
        return info

    def _check_index(self, name: str, info: TensorInfo, index: torch.Tensor, dim: int) -> None:
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ActTypeError(
                f"{self.path}: {name}: got indices of {index.dtype} and shape {list(index.shape)}, expected int64 [K]"
            )
        if dim not in (0, 1) or dim >= len(info.shape) or (dim == 1 and len(info.shape) != 2):
            raise ActValueError(f"{self.path}: {name}: got axis {dim}, expected one of the shape {list(info.shape)}")
        if not index.numel():
            return
        where = index.numpy()
        if where[0] < 0 or where[-1] >= info.shape[dim] or not (where[1:] > where[:-1]).all():
            raise ActValueError(
                f"{self.path}: {name}: got indices from {int(index.min())} to {int(index.max())}, expected ascending "
                f"ones in [0, {info.shape[dim]})"
            )

    def _rows_between(self, info: TensorInfo, first: int, stop: int, *, whole: bool = False) -> np.ndarray:
        width = info.row_bytes
        mapped = self._map(info.start + first * width, info.start + stop * width, info, whole=whole)
        return mapped.reshape(stop - first, *info.shape[1:])

    def _fetch(self, info: TensorInfo, where: np.ndarray) -> None:
        """Ask the system for all rows before the first is read; otherwise each page waits for the disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        file, width = self._file.fileno(), info.row_bytes
        breaks = np.flatnonzero(where[1:] != where[:-1] + 1) + 1
        starts = where[np.concatenate(([0], breaks))]
        stops = where[np.concatenate((breaks, [len(where)])) - 1] + 1
        for place, length in zip(
            (info.start + starts * width).tolist(), ((stops - starts) * width).tolist(), strict=True
        ):
            os.posix_fadvise(file, place, length, os.POSIX_FADV_WILLNEED)

    def _map(self, start: int, stop: int, info: TensorInfo, *, whole: bool = False) -> np.ndarray:
        """A private view of some bytes of a tensor; `whole` means that all of them will be read."""
        raw = self._map_bytes(start, stop, whole=whole)
        aligned = raw if start * 8 % BITS[info.dtype] == 0 else raw.copy()
        return aligned.view(_raw_dtype(info))

    def _map_bytes(self, start: int, stop: int, *, whole: bool) -> np.ndarray:
        """A private view of some bytes of the file. They are unmapped when nothing refers to the view any more."""
        if start == stop:
            return np.empty(0, np.uint8)
        offset = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._file.fileno(), stop - offset, access=mmap.ACCESS_COPY, offset=offset)
        except (ValueError, OSError) as error:
            raise ActValueError(
                f"{self.path}: bytes {start} to {stop} cannot be read ({error}), expected the file of {self.size} "
                "bytes that was opened (it was changed in the meantime)"
            ) from error
        if whole and sys.platform == "linux":
            with suppress(OSError):  # Linux before 5.14 maps each page when it is read
                mapped.madvise(_MADV_POPULATE_READ)
        elif not whole and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # without it the system reads 128 KB around every row
        return np.frombuffer(mapped, np.uint8, count=stop - start, offset=start - offset)

    def _result(self, shape: tuple[int, ...], info: TensorInfo, raw: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(raw.view(_raw_dtype(info))).view(DTYPES[info.dtype]).reshape(shape)


_INTEGERS = {8: np.uint8, 16: np.int16, 32: np.int32, 64: np.int64}


def _raw_dtype(info: TensorInfo) -> Any:
    return _INTEGERS[BITS[info.dtype]]


def _read_header(path: Path, file: Any, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
    if not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise ActValueError(
            f"{path}: got {size} bytes and a header of {length}, expected a whole safetensors file "
            "(it is cut off, damaged or of a different format; copy or download it again)"
        )
    header = parse_json(file.read(length), f"{path}: its header")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, (dict, type(None))):
        raise ActValueError(f"{path}: its header has the metadata {str(metadata)[:80]}, expected an object of texts")
    return header, 8 + length


def _checked_tensors(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    tensors = {name: _checked_entry(path, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise ActValueError(
                f"{path}: {name}: its data begin at byte {info.start}, expected {end} (the header is damaged)"
            )
        end = info.stop
    if end != size:
        raise ActValueError(
            f"{path}: got {size} bytes, expected {end} by its header (it is cut off or damaged; copy or download it "
            "again)"
        )
    return tensors


def _integers(value: Any) -> list[int] | None:
    good = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
    return value if good else None


def _checked_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _integers(fields.get("shape")), _integers(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ActValueError(f"{path}: {name}: the header says {str(entry)[:120]}, expected dtype, shape, data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ActValueError(f"{path}: {name}: got dtype {str(dtype)[:40]!r}, expected one of {', '.join(BITS)}")
    if len(shape) > _MAX_DIMS or math.prod(n for n in shape if n) > _MAX_ELEMENTS:
        raise ActValueError(f"{path}: {name}: got the shape {str(shape)[:80]}, expected the shape of a weight")
    bits = math.prod(shape) * BITS[dtype]
    expected = bits / 8 if bits % 8 else bits // 8
    if offsets[1] - offsets[0] != expected:
        raise ActValueError(
            f"{path}: {name}: got {offsets[1] - offsets[0]} bytes, expected {expected} for {dtype} {str(shape)[:80]} "
            "(the header is damaged)"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
