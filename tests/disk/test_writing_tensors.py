"""Files written tensor by tensor are those of the safetensors library, and so are headers with more tensors."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from act_peft.disk.shard import Shard
from act_peft.disk.writing import header_with, size_of, write_tensors


def some_tensors():
    return {
        "index": torch.arange(3),
        "a": torch.randn(3, 5),
        "b": torch.randn(4, 3).T,
        "empty": torch.empty(0, 2),
        "one of a column": torch.randn(1, 6)[:, 5],
        "scalar": torch.tensor(2.5),
        "hü": torch.randn(3).bfloat16(),
    }


def test_the_bytes_are_those_of_safetensors(tmp_path):
    tensors = some_tensors()
    infos = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(tmp_path / "ours", infos, iter(tensors.values()))
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())
    assert size_of(infos) == 3 * 8 + 15 * 4 + 12 * 4 + 4 + 4 + 3 * 2


def test_one_tensor_is_asked_for_at_a_time(tmp_path):
    sizes = []

    def tensors():
        for _ in range(3):
            sizes.append((tmp_path / "file").stat().st_size)
            yield torch.zeros(1 << 14)

    write_tensors(tmp_path / "file", {str(i): (torch.float32, (1 << 14,)) for i in range(3)}, tensors())
    assert sizes[2] - sizes[1] >= 1 << 15  # the one before is with the system already, but for a buffer


def test_a_file_that_exists_stays(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", {}, [])
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_header_with_one_more_tensor_makes_a_file_that_the_library_reads(tmp_path):
    tensors = {"half": torch.randn(7, 5).bfloat16(), "index": torch.arange(6)}
    path = tmp_path / "t.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with Shard(path) as shard:
        head, order = header_with(shard, {"a new one, named ü": shard.info("half")})
        data = path.read_bytes()[shard.data_start :]
    assert order == ["index", "half", "a new one, named ü"]
    assert len(head) % 8 == 0
    path.write_bytes(head + data + bytes(7 * 5 * 2))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("half"), tensors["half"])
        assert not file.get_tensor("a new one, named ü").any()
