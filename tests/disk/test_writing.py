"""Files that are gathered from pieces, against the same bytes put together by hand."""

from __future__ import annotations

import os

import pytest
import torch

from act_peft.disk import writing as gather
from act_peft.disk.writing import GatheringWriter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.fixture(params=["as it is", "few pieces", "few bytes", "cut short", "without writev"], autouse=True)
def _system(request, monkeypatch):
    if request.param == "few pieces":
        monkeypatch.setattr(gather, "_AT_ONCE", 2)
    elif request.param == "few bytes":
        monkeypatch.setattr(gather, "_WAITING", 1)
    elif request.param == "cut short":

        def writev(file, pieces):
            return os.write(file, b"".join(pieces)[:5])

        monkeypatch.setattr(os, "writev", writev)
    elif request.param == "without writev":
        monkeypatch.setattr(gather, "_HAS_WRITEV", False)


def raw(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [[], [0], [9], [3, 4, 5], [0, 2, 3, 9], list(range(10))])
def test_rows_stand_between_those_that_stay(tmp_path, dtype, index):
    block, rows = torch.randn(10, 3).to(dtype), torch.randn(len(index), 3).to(dtype)
    with GatheringWriter(tmp_path / "f") as out:
        out.write(b"head")
        out.write(b"")
        out.write_with_rows(block, torch.tensor(index, dtype=torch.int64), rows)
        out.write(rows)
        out.write(memoryview(b"tail"))
    expected = [raw(rows[index.index(i)]) if i in index else raw(block[i]) for i in range(10)]
    assert (tmp_path / "f").read_bytes() == b"head" + b"".join(expected) + raw(rows) + b"tail"


def fail_inside(path):
    with GatheringWriter(path) as out:
        out.write(b"x")
        raise KeyError("stop")


def test_an_error_inside_is_handed_on_and_a_file_that_exists_is_refused(tmp_path):
    with pytest.raises(KeyError, match="stop"):
        fail_inside(tmp_path / "f")
    with pytest.raises(FileExistsError, match="exists"):
        GatheringWriter(tmp_path / "f")


def test_several_writers_fill_one_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    for start, data in ((6, b"ghij"), (0, b"abc"), (3, b"def")):
        with GatheringWriter(path, start=start) as out:
            out.write(data)
    assert path.read_bytes() == b"abcdefghij"
