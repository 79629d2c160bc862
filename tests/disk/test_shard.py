"""One safetensors file as bytes: against the safetensors library, and every damage that a header can have."""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from act_peft import ActTypeError, ActValueError
from act_peft.disk import shard as module
from act_peft.disk.shard import BITS, DTYPES, Shard
from tests.support.tiny_checkpoints import write_shard
from tests.support.versions import skip_as_older


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(40, 6, generator=generator),
        "half": torch.randn(7, 5, generator=generator).bfloat16(),
        "vector": torch.randn(9, generator=generator).double(),
        "index": torch.arange(6),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "cube": torch.randn(4, 3, 2, generator=generator),
        "eight": torch.randn(4, 3, generator=generator).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def path(tmp_path, tensors):
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    return tmp_path / "t.safetensors"


@pytest.fixture(params=[8 << 20, 64], ids=["one window", "many windows"])
def _window(request, monkeypatch):
    monkeypatch.setattr(module, "_WINDOW", request.param)


@pytest.mark.usefixtures("_window")
def test_tensors_blocks_and_rows_are_those_of_the_library(path, tensors):
    with Shard(path) as shard:
        assert shard.metadata == {"format": "pt"}
        assert set(shard.tensors) == set(tensors)
        for name, expected in tensors.items():
            assert torch.equal(shard.tensor(name).float(), expected.float()), name
            assert shard.tensor(name).dtype == expected.dtype
        matrix = tensors["matrix"]
        assert torch.equal(shard.block("matrix", 3, 33), matrix[3:33])
        assert torch.equal(shard.view("matrix", 3, 33), matrix[3:33])
        index = torch.tensor([0, 1, 7, 8, 30, 39])
        assert torch.equal(shard.rows("matrix", index), matrix[index])
        assert torch.equal(shard.rows("matrix", torch.tensor([1, 5]), 1), matrix[:, [1, 5]])
        assert torch.equal(shard.rows("matrix", torch.arange(40)), matrix)
        assert torch.equal(shard.rows("matrix", torch.arange(6), 1), matrix)
        assert torch.equal(shard.rows("half", torch.tensor([6])), tensors["half"][[6]])
        assert torch.equal(shard.rows("vector", torch.tensor([0, 8])), tensors["vector"][[0, 8]])
        assert torch.equal(shard.rows("cube", torch.tensor([1, 3])), tensors["cube"][[1, 3]])
        assert shard.rows("matrix", torch.empty(0, dtype=torch.int64)).shape == (0, 6)


def test_what_is_handed_out_is_a_copy(path, tensors):
    with Shard(path) as shard:
        shard.tensor("matrix").zero_()
        shard.rows("matrix", torch.tensor([1])).zero_()
        shard.view("matrix", 0, 2).zero_()
        assert torch.equal(shard.tensor("matrix"), tensors["matrix"])
        kept = shard.tensor("matrix")
    assert torch.equal(kept, tensors["matrix"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what it reads from the disk")
@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_cost_their_pages_and_not_their_neighbours(tmp_path, in_memory):
    matrix = torch.arange(4096 * 512, dtype=torch.float32).reshape(4096, 512)  # 8 MB, rows of 2 KB
    index = torch.cat([torch.arange(20, 4096, 200), torch.tensor([4094, 4095])])
    save_file({"matrix": matrix}, tmp_path / "t")

    def bytes_from_disk():
        return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])

    with Shard(tmp_path / "t") as shard, open(tmp_path / "t", "rb") as file:
        os.fsync(file)
        if not in_memory:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = bytes_from_disk()
        assert torch.equal(shard.rows("matrix", index), matrix[index])
        assert bytes_from_disk() - before <= len(index) * 2 * mmap.PAGESIZE


def test_an_unaligned_header_is_read(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header)
    text += " " * (3 - len(text) % 8 % 8)
    path = write_shard(tmp_path / "t", text.encode(), torch.tensor([1.0, 2.0]).numpy().tobytes())
    with Shard(path) as shard:
        assert shard.tensor("x").tolist() == [1.0, 2.0]


def library_knows(dtype):
    """Whether the installed safetensors reads a file with a tensor of a dtype."""
    size = BITS[dtype]  # bytes of eight elements
    try:
        deserialize(encoded({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}, bytes(size)))
    except SafetensorError:
        return False
    return True


def test_the_dtypes_are_those_of_the_library():
    if not library_knows("F4"):
        skip_as_older("safetensors", "does not list its dtypes in an error")
    with pytest.raises(SafetensorError, match="unknown variant `F33`") as refused:
        deserialize(encoded({"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)))
    known = set(re.findall(r"`(\w+)`", str(refused.value))) - {"F33"}
    assert set(BITS) == known
    assert set(DTYPES) <= known
    assert all(dtype.itemsize * 8 == BITS[name] for name, dtype in DTYPES.items())


@pytest.mark.parametrize("dtype", BITS)
def test_a_tensor_of_any_dtype_does_no_harm_to_its_neighbours(tmp_path, dtype):
    size = 8 * BITS[dtype] // 8
    header = {
        "x": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    content = encoded(header, bytes(range(size)) + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert not library_knows(dtype) or len(deserialize(content)) == 2  # the library finds it valid
    (tmp_path / "t").write_bytes(content)
    with Shard(tmp_path / "t") as shard:
        assert shard.tensor("y").tolist() == [1.0, 2.0]
        assert shard.shape("x") == (2, 4)
        assert b"".join(shard.pieces(shard.info("x").start, shard.info("x").stop)) == bytes(range(size))
        if dtype in DTYPES:
            assert shard.rows("x", torch.tensor([1])).dtype == shard.dtype("x") == DTYPES[dtype]
            return
        match = f"x is {dtype}, expected a tensor of F64, F32"
        one = torch.tensor([1])
        for read in (shard.tensor, shard.dtype, lambda n: shard.rows(n, one), lambda n: shard.block(n, 0, 1)):
            with pytest.raises(ActValueError, match=match):
                read("x")


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz", "complex64", "float8_e8m0fnu", "float4_e2m1fn_x2"]
)
def test_unusual_dtypes_as_the_library_writes_them(tmp_path, dtype):
    if not hasattr(torch, dtype):
        skip_as_older("torch", f"has no {dtype}")
    if not library_knows("F4"):
        skip_as_older("safetensors", f"writes no {dtype}")
    raw = torch.arange(16, dtype=torch.int64 if dtype == "complex64" else torch.uint8).reshape(4, 4)
    save_file({"x": raw.view(getattr(torch, dtype)), "y": torch.ones(3)}, tmp_path / "t")
    with Shard(tmp_path / "t") as shard:
        assert torch.equal(shard.tensor("y"), torch.ones(3))
        if shard.info("x").dtype in DTYPES:
            assert torch.equal(shard.tensor("x").view(raw.dtype), raw)


BAD_READS = {
    "no such tensor": (lambda s: s.tensor("nothing"), "has no tensor 'nothing', expected one"),
    "beyond the end": (
        lambda s: s.rows("matrix", torch.tensor([40])),
        r"got indices from 40 to 40, expected .* \[0, 40\)",
    ),
    "negative": (lambda s: s.rows("matrix", torch.tensor([-1, 3])), "got indices from -1 to 3"),
    "not ascending": (lambda s: s.rows("matrix", torch.tensor([3, 1])), "got indices from 1 to 3, expected ascending"),
    "twice": (lambda s: s.rows("matrix", torch.tensor([3, 3])), "expected ascending"),
    "a column beyond the end": (lambda s: s.rows("matrix", torch.tensor([6]), 1), r"\[0, 6\)"),
    "columns of a vector": (lambda s: s.rows("vector", torch.tensor([0]), 1), r"got axis 1, expected one of .* \[9\]"),
    "columns of a cube": (lambda s: s.rows("cube", torch.tensor([0]), 1), "got axis 1"),
    "rows of a scalar": (lambda s: s.rows("scalar", torch.tensor([0])), "got axis 0"),
    "a block beyond the end": (lambda s: s.block("matrix", 3, 41), "got rows 3 to 41, expected a range"),
    "a view beyond the end": (lambda s: s.view("matrix", 3, 41), "got rows 3 to 41, expected a range"),
}


@pytest.mark.parametrize("what", BAD_READS)
def test_reads_outside_a_tensor_are_refused(path, what):
    read, match = BAD_READS[what]
    with Shard(path) as shard, pytest.raises(ActValueError, match=match):
        read(shard)


def test_indices_of_another_dtype_are_refused(path):
    with Shard(path) as shard, pytest.raises(ActTypeError, match=r"got indices of torch\.int32"):
        shard.rows("matrix", torch.tensor([1], dtype=torch.int32))


def encoded(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


HEADERS = {
    "not JSON": (b"{" * 20, b"", "its header: is not JSON"),
    "deep": (b"[" * 100_000, b"", "its header: is not JSON"),
    "a list": ([1, 2, 3], b"", r"its header: got \[1, 2, 3\], expected an object"),
    "metadata": ({"__metadata__": 3}, b"", "its header has the metadata 3, expected an object"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "the header says"),
    "no table": ({"x": 3}, bytes(8), "the header says 3, expected dtype, shape, data_offsets"),
    "negative": (entry(shape=(-2,)), bytes(8), "the header says"),
    "fractions": (entry(shape=(2.0,)), bytes(8), "the header says"),
    "booleans": (entry(shape=(True,), offsets=(0, 4)), bytes(4), "the header says"),
    "three offsets": (entry(offsets=(0, 8, 9)), bytes(8), "the header says"),
    "dtype": (entry(dtype="F33"), bytes(8), "got dtype 'F33', expected one of"),
    "dtype of a list": (entry(dtype=[1]), bytes(8), "got dtype '.1.', expected one of"),
    "an absurd size": (entry(shape=(2**40,), offsets=(0, 2**42)), bytes(8), "got 8?.* bytes, expected"),
    "an absurd shape": (entry(shape=(2**62, 2**62)), bytes(8), "expected the shape of a weight"),
    "an absurd empty shape": (entry(shape=(0, 2**62), offsets=(0, 0)), b"", "expected the shape of a weight"),
    "many axes": (entry(shape=(1,) * 40, offsets=(0, 4)), bytes(4), "expected the shape of a weight"),
    "other bytes": (entry(offsets=(0, 7)), bytes(7), "got 7 bytes, expected 8"),
    "half a byte": (entry(dtype="F4", shape=(3,), offsets=(0, 2)), bytes(2), r"got 2 bytes, expected 1\.5 for F4"),
    "a hole": (entry(offsets=(8, 16)), bytes(16), "its data begin at byte"),
    "overlap": ({**entry(), "y": entry()["x"]}, bytes(8), "its data begin at byte"),
    "cut": (entry(), bytes(7), "it is cut off or damaged"),
    "too long": (entry(), bytes(9), "it is cut off or damaged"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie_are_refused(tmp_path, what):
    header, data, match = HEADERS[what]
    with pytest.raises(ActValueError, match=match):
        Shard(write_shard(tmp_path / "t.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"1234", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ActValueError, match="expected a whole safetensors file"):
        Shard(tmp_path / "t")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ActValueError, match="is no regular file, expected a safetensors file"):
            Shard(place)


def test_a_missing_file_and_one_that_shrinks_are_refused(path):
    with pytest.raises(ActValueError, match="cannot be opened"):
        Shard(path.with_name("nothing"))
    with Shard(path) as shard:
        with open(path, "r+b") as file:
            file.truncate(10)
        with pytest.raises(ActValueError, match="it was changed in the meantime"):
            shard.tensor("matrix")


@pytest.mark.usefixtures("_window")
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (3, 1000), (5, 5)])
def test_pieces_are_the_bytes_of_the_file(path, start, stop):
    with Shard(path) as shard:
        assert b"".join(shard.pieces(start, stop)) == path.read_bytes()[start:stop]
