"""Any index in an adapter's or a mask's file is taken exactly if it is what the format says (hypothesis)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from act_peft import ActLoadError, ActValueError, ChannelMask
from act_peft.adapter.stored import read_deltas
from act_peft.disk import tensorfile
from act_peft.disk.shard import Shard
from tests.support.random_models import holds

numbers = st.integers(-2, 9) | st.sampled_from([2**31, 2**53, 2**63 - 1, -(2**63)])
lists = st.lists(numbers, max_size=5) | st.lists(st.integers(0, 9), max_size=5, unique=True).map(sorted)
dtypes = st.sampled_from([torch.int64] * 5 + [torch.int32, torch.float32, torch.uint8])
counts = st.none() | st.integers(0, 6)


def is_good(index: list[int], dtype: torch.dtype, channels: int | None) -> bool:
    ascending = index == sorted(set(index))
    return dtype is torch.int64 and ascending and all(i >= 0 and (channels is None or i < channels) for i in index)


def tensor_of(index: list[int], dtype: torch.dtype) -> torch.Tensor:
    values = torch.tensor(index, dtype=torch.int64)
    return values if dtype is torch.int64 else (values % 100).to(dtype)


@holds(
    150,
    index=lists,
    dtype=dtypes,
    rows=counts,
    bias=counts,
    selected=counts,
    channels=st.none() | st.integers(6, 10),
    kind=st.sampled_from([None, "linear", "embedding", "RMS norm"]),
)
def test_an_adapter_is_taken_if_its_parts_agree(index, dtype, rows, bias, selected, channels, kind):
    rows = len(index) if rows is None else rows
    shape = {"embedding": (3, rows), "RMS norm": (rows,)}.get(kind, (rows, 3))
    tensors = {"index": tensor_of(index, dtype), "weight": torch.zeros(shape)}
    if bias is not None:
        tensors["bias"] = torch.zeros(bias)
    record = {"channels": channels, "selected": selected, "kind": kind}
    record = {name: value for name, value in record.items() if value is not None}
    lengths = {rows} if kind is not None else {rows, 3}  # rows or columns, where no kind is recorded
    fits = len(index) in lengths and bias in (None, len(index)) and selected in (None, len(index))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.safetensors")
        save_file({f"base_model.model.x.act_delta_{part}": tensor for part, tensor in tensors.items()}, path)
        with Shard(path) as shard:
            if is_good(index, dtype, channels) and fits:
                (found,) = read_deltas(shard, "a", recorded={"x": record}).values()
                assert found.index.tolist() == index
                assert found.weight_shape == shape
            else:
                with pytest.raises(ActLoadError, match=r"^a: x: "):
                    read_deltas(shard, "a", recorded={"x": record})


@holds(100, index=lists, dtype=dtypes, channels=st.integers(1, 10))
def test_a_mask_is_taken_if_its_indices_are_ascending_and_in_range(index, dtype, channels):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mask")
        tensorfile.write(path, "channel mask", 1, {"x": tensor_of(index, dtype)}, {"modules": [["x", channels]]})
        if is_good(index, dtype, channels):
            assert ChannelMask.load(path)["x"].tolist() == index
        else:
            with pytest.raises(ActValueError, match="x: "):
                ChannelMask.load(path)
