"""Factors of rows: exact wherever the matrix allows it, otherwise the best ones; what each rank loses."""

from __future__ import annotations

import math

import pytest
import torch

from act_peft.export.factors import Losses, factor_rank, factors, lost_squares


@pytest.mark.parametrize(("count", "width"), [(4, 9), (9, 4), (5, 5), (1, 1)])
def test_the_product_is_the_delta_and_no_factor_is_wider_than_it(count, width, dtype):
    rows = torch.randn(count, width).to(dtype)
    rank = factor_rank(count, width, None)
    left, right = factors(rows, rank)
    assert rank == min(count, width) == left.shape[1] == right.shape[0]
    assert torch.equal(left @ right, rows)


@pytest.mark.parametrize(("count", "width"), [(9, 6), (6, 9)])
def test_a_lower_rank_is_the_best_one(count, width):
    rows = torch.randn(count, width, dtype=torch.float64)
    left, right = factors(rows, 2)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :2] * s[:2]) @ vh[:2])
    expected = [float(s[rank:].square().sum()) for rank in range(len(s) + 1)]
    torch.testing.assert_close(lost_squares(rows), torch.tensor(expected, dtype=torch.float64))


def test_rows_of_zeros_lose_nothing():
    left, right = factors(torch.zeros(9, 6), 2)
    assert torch.equal(left @ right, torch.zeros(9, 6))
    assert torch.equal(lost_squares(torch.zeros(9, 6)), torch.zeros(7, dtype=torch.float64))


def test_the_factors_keep_the_dtype():
    left, right = factors(torch.randn(9, 6).bfloat16(), 2)
    assert left.dtype == right.dtype == torch.bfloat16


def test_the_rank_for_an_error_counts_all_modules():
    first, second = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    losses = Losses()
    losses.add_(lost_squares(first))
    losses.add_(lost_squares(second))
    total = 9 + 1 + 4 + 1 + 1
    for rank, lost in enumerate((16.0, 3.0, 1.0, 0.0)):
        error = math.sqrt(lost / total)
        assert losses.rank_for(error + 1e-9) == max(rank, 1)
        if rank > 1:
            assert losses.rank_for(error - 1e-9 if lost else 0.0) == (rank + 1 if lost else rank)
    assert Losses().rank_for(0.05) == 1
