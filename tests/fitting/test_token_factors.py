from __future__ import annotations

import pytest
import torch

from act_peft.fitting.token_factors import token_factors

TOKENS, WIDTH = 12, 5


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    hidden = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64).pow(4) * 20
    weights[:4] = 0
    return delta, hidden.T @ hidden / 9 + 0.03 * torch.eye(WIDTH, dtype=torch.float64), weights


def lost(rest: torch.Tensor, metric: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return sum(row @ metric @ row + weight * row @ row for row, weight in zip(rest, weights, strict=True))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_numerical_optimizer_finds_nothing_better(rank: int, seed: int) -> None:
    delta, metric, weights = problem(seed)
    left, right, reported = token_factors(delta, metric, weights, rank)
    assert left.shape == (TOKENS, rank)
    assert right.shape == (rank, WIDTH)
    reached = float(lost(delta - left @ right, metric, weights))
    assert reported == pytest.approx(reached)
    b, a = left.clone().requires_grad_(), right.clone().requires_grad_()
    slopes = torch.autograd.grad(lost(delta - b @ a, metric, weights), (a, b))
    total = float(lost(delta, metric, weights))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-2 * total
    optimizer = torch.optim.LBFGS([a, b], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = lost(delta - b @ a, metric, weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(reached, abs=2e-3 * total)


def test_one_metric_for_all_rows_is_the_singular_value_decomposition() -> None:
    delta, metric, weights = problem()
    weights = torch.full_like(weights, 0.5)
    *_, reported = token_factors(delta, metric, weights, 2)
    root = torch.linalg.cholesky(metric + 0.5 * torch.eye(WIDTH, dtype=torch.float64))
    assert reported == pytest.approx(float(torch.linalg.svdvals(delta @ root)[2:].square().sum()))


def test_full_rank_loses_nothing() -> None:
    delta, metric, weights = problem()
    left, right, reported = token_factors(delta, metric, weights, 9)
    torch.testing.assert_close(left @ right, delta)
    assert reported < 1e-20


def test_no_change_has_factors_too() -> None:
    delta, metric, weights = problem()
    left, right, reported = token_factors(delta * 0, metric, weights, 2)
    assert reported == 0
    assert not (left @ right).any()


def test_large_changes_are_factored_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, metric, weights = problem()
    *_, exact = token_factors(delta, metric, weights, 2)
    monkeypatch.setattr("act_peft.fitting.token_factors._DOUBLE_NUMBERS", 0)
    left, right, reported = token_factors(delta, metric, weights, 2)
    assert left.dtype is right.dtype is torch.float32
    assert reported == pytest.approx(exact, rel=1e-3)
