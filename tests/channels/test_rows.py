"""The arithmetic of rows against a loop in plain Python."""

from __future__ import annotations

import pytest
import torch

from act_peft.channels.rows import all_finite, merged_rows, wide_difference, wide_dtype
from tests.support.tiny_models import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_merged_rows_add_one_by_one_and_round_once(dtype, dim):
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(5, 5, generator=generator).to(dtype)
    index = torch.tensor([1, 3, 4, 7, 9])
    deltas = [
        (torch.tensor([3, 9]), torch.randn((2, 5) if dim == 0 else (5, 2), generator=generator), 1.0),
        (torch.tensor([1, 3]), torch.randn((2, 5) if dim == 0 else (5, 2), generator=generator), 0.5),
    ]
    before = original.clone()
    result = merged_rows(original, index, deltas, dim=dim)
    assert torch.equal(original, before)
    for i in range(5):
        for j in range(5):
            total = original[i, j].float()
            for channels, delta, scale in deltas:
                channel = int(index[i if dim == 0 else j])
                if channel in channels.tolist():
                    k = channels.tolist().index(channel)
                    total = total + delta[(k, j) if dim == 0 else (i, k)] * scale
            assert result[i, j] == total.to(dtype)


def test_the_difference_is_wide():
    donor, base = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert torch.equal(wide_difference(donor, base), torch.tensor([-0.0078125]))
    assert wide_dtype(torch.bfloat16) == torch.float32
    assert wide_dtype(torch.float16, torch.float64) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_is_what_isfinite_says(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.empty(0, 3, dtype=dtype))
    for value in (0.0, largest, -largest, float("nan"), float("inf"), -float("inf")):
        values = torch.full((3, 2), largest, dtype=dtype)
        values[1, 1] = value
        assert all_finite(values) == bool(torch.isfinite(values).all())
