from __future__ import annotations

import pytest
import torch

from act_peft.errors import ActValueError
from act_peft.fitting.moments import InputMoments
from act_peft.fitting.settings import FitSettings
from act_peft.fitting.tokens import TokenCounts, solve_tied, solve_tokens
from tests.fitting.oracle import least_squares, objective

TOKENS, WIDTH = 9, 4
SETTINGS = [
    {"keep_weight": 1.0, "ridge": 0.03, "prior_scale": 0.0},
    {"keep_weight": 3.0, "ridge": 0.3, "prior_scale": 0.4},
]


def counts_of(sources) -> TokenCounts:
    counts = TokenCounts("embedding", TOKENS, num_donors=len(sources) - 1)
    for number, ids in enumerate(sources):
        if ids is not None:
            counts.add_(number, torch.tensor(ids))
    return counts


def one_hot(ids) -> torch.Tensor:
    return torch.eye(TOKENS, dtype=torch.float64)[torch.tensor(ids)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("keep", [[1, 1, 2, 7], None])
@pytest.mark.parametrize("ability", [([0, 1, 1, 5],), ([0, 1, 1, 5], [5, 5, 2])])
def test_an_embedding_is_a_linear_module_over_one_hot_inputs(ability, keep, settings) -> None:
    differences = [draw(TOKENS, WIDTH, seed=j) for j in range(len(ability))]
    solution = solve_tokens(
        counts_of([*ability, keep]),
        lambda rows: [d[rows] for d in differences],
        FitSettings(**settings),
        width=WIDTH,
        dtype=torch.float64,
    )
    rows, kept = [one_hot(ids) for ids in ability], None if keep is None else one_hot(keep)
    transposed = [d.T for d in differences]  # as W of y = W x with one-hot x
    expected = least_squares(transposed, rows, kept, **settings)
    torch.testing.assert_close(solution.delta, expected.T)
    falls = [objective(x, transposed, rows, kept, **settings) for x in (torch.zeros_like(expected), expected)]
    torch.testing.assert_close(solution.token_gains.sum(), (falls[0] - falls[1]).sum())
    unused = [t for t in range(TOKENS) if t not in {i for ids in [*ability, keep or []] for i in ids}]
    prior = settings["prior_scale"] * sum(differences) / len(differences)
    torch.testing.assert_close(solution.delta[unused], prior[unused])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("donors", [1, 2])
@pytest.mark.parametrize("has_keep", [True, False])
@pytest.mark.parametrize("hidden_tokens", [2, 20])
@pytest.mark.parametrize("tied_weight", [1.0, 0.3])
def test_both_uses_of_a_tied_weight_stand_in_one_objective(
    donors: int, has_keep: bool, hidden_tokens: int, tied_weight: float, settings
) -> None:
    differences = [draw(TOKENS, WIDTH, seed=j) for j in range(donors)]
    ids = [[0, 1, 1, 5], [5, 5, 2]][:donors]
    hidden = [draw(hidden_tokens, WIDTH, seed=7 + j) * (1 + j) for j in range(donors)]
    keep_ids, keep = ([1, 1, 2, 7], draw(hidden_tokens, WIDTH, seed=20) + 1) if has_keep else (None, None)
    moments = InputMoments("head", WIDTH, num_donors=donors, has_bias=False)
    for number, rows in enumerate([*hidden, keep]):
        if rows is not None:
            moments.add_(number, rows)
    chosen = FitSettings(**settings)
    solution = solve_tied(
        counts_of([*ids, keep_ids]),
        moments.metric(chosen),
        lambda rows: [d[rows] for d in differences],
        chosen,
        dtype=torch.float64,
        tied_weight=tied_weight,
    )

    squares = [float(rows.square().mean()) for rows in hidden]
    m = float(keep.square().mean()) if has_keep else sum(squares) / donors
    prior = settings["prior_scale"] * sum(differences) / donors

    def of_row(delta: torch.Tensor, token: int) -> torch.Tensor:
        """The objective of one token's row, use by use and token by token."""
        total = settings["ridge"] * m * (delta - prior[token]).square().sum()
        for difference, rows, square, used in zip(differences, hidden, squares, ids, strict=True):
            for h in rows:  # as output layer
                total = total + m / square / len(rows) * ((difference[token] - delta) @ h) ** 2
            share = used.count(token) / len(used)  # as embedding
            total = total + tied_weight * m * TOKENS * share * (difference[token] - delta).square().sum()
        if has_keep:
            for h in keep:
                total = total + settings["keep_weight"] / len(keep) * (delta @ h) ** 2
            share = keep_ids.count(token) / len(keep_ids)
            total = total + tied_weight * m * TOKENS * settings["keep_weight"] * share * delta.square().sum()
        return total

    for token in range(TOKENS):
        row = solution.delta[token].clone().requires_grad_()
        (slope,) = torch.autograd.grad(of_row(row, token), row)
        torch.testing.assert_close(slope, torch.zeros(WIDTH, dtype=torch.float64), rtol=0, atol=1e-9)
        fall = of_row(torch.zeros(WIDTH, dtype=torch.float64), token) - of_row(solution.delta[token], token)
        torch.testing.assert_close(solution.token_gains[token], fall)


def test_blocks_of_tokens_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    difference, settings = draw(TOKENS, WIDTH), FitSettings()
    counts = counts_of([[0, 1, 1, 5], [1, 2]])
    moments = InputMoments("head", WIDTH, num_donors=1, has_bias=False)
    moments.add_(0, draw(9, WIDTH, seed=1))
    moments.add_(1, draw(9, WIDTH, seed=2))
    read = lambda rows: [difference[rows]]

    def both():
        alone = solve_tokens(counts, read, settings, width=WIDTH, dtype=torch.float64)
        return alone, solve_tied(counts, moments.metric(settings), read, settings, dtype=torch.float64)

    whole = both()
    monkeypatch.setattr("act_peft.fitting.tokens._BLOCK", 2 * WIDTH)
    for mine, theirs in zip(both(), whole, strict=True):
        torch.testing.assert_close(mine.delta, theirs.delta)
        torch.testing.assert_close(mine.token_gains, theirs.token_gains)


def test_an_embedding_that_no_token_reaches() -> None:
    with pytest.raises(ActValueError, match="embedding: no token of the ability's data reaches it"):
        counts_of([None, [1]]).shares(FitSettings())
