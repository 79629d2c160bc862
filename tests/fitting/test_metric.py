from __future__ import annotations

import pytest
import torch

from act_peft.errors import ActValueError
from act_peft.fitting.metric import DualMetric, PrimalMetric
from act_peft.fitting.moments import InputMoments
from act_peft.fitting.settings import FitSettings
from act_peft.fitting.solution import solve_rows
from tests.fitting.oracle import least_squares, objective, with_ones

WIDTH, ROWS = 7, 5
SETTINGS = [
    {"keep_weight": 1.0, "ridge": 0.03, "prior_scale": 0.0},
    {"keep_weight": 3.0, "ridge": 0.3, "prior_scale": 0.4},
    {"keep_weight": 0.0, "ridge": 1e-3, "prior_scale": 1.0},
]


def problem(*, tokens: tuple[int, ...], keep: int | None, seed: int = 0, bias: bool = False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    ability = [draw(count, WIDTH) * (1 + 3 * j) + 0.5 for j, count in enumerate(tokens)]
    kept = None if keep is None else draw(keep, WIDTH) * 2 - 0.3
    return [draw(ROWS, WIDTH + bias) for _ in tokens], ability, kept


def moments_of(ability, keep, *, bias: bool = False, pieces: int = 1) -> InputMoments:
    moments = InputMoments("layer", WIDTH, num_donors=len(ability), has_bias=bias)
    for source, rows in enumerate([*ability, keep]):
        for piece in [] if rows is None else rows.chunk(pieces):
            moments.add_(source, piece)
    return moments


def solve(moments: InputMoments, differences, settings, **kwargs):
    options = {"max_rank": 0, "dtype": torch.float64, **kwargs}
    metric = moments.metric(FitSettings(**settings))
    return solve_rows(metric, lambda rows: [d[rows] for d in differences], len(differences[0]), **options)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "keep"),
    [((2,), 3), ((30,), 40), ((3,), None), ((30,), None), ((2, 2), 2), ((9, 20, 4), 11), ((4, 9), None)],
)
def test_the_change_is_that_of_brute_force_least_squares(tokens, keep, bias, settings) -> None:
    differences, ability, kept = problem(tokens=tokens, keep=keep, bias=bias)
    solution = solve(moments_of(ability, kept, bias=bias), differences, settings)
    if bias:
        ability, kept = [with_ones(x) for x in ability], None if kept is None else with_ones(kept)
    expected = least_squares(differences, ability, kept, **settings)
    torch.testing.assert_close(solution.delta, expected)
    before = objective(torch.zeros_like(expected), differences, ability, kept, **settings)
    after = objective(expected, differences, ability, kept, **settings)
    torch.testing.assert_close(solution.gains, before - after)
    assert bool((solution.gains >= 0).all())


@pytest.mark.parametrize("settings", SETTINGS)
def test_primal_and_dual_give_the_same(settings) -> None:
    differences, ability, keep = problem(tokens=(3, 2), keep=4)
    chosen = FitSettings(**settings)
    weights = [float(keep.square().mean() / x.square().mean()) for x in ability] + [chosen.keep_weight]
    rows = [x * (w / len(x)) ** 0.5 for x, w in zip([*ability, keep], weights, strict=True)]
    options = {"ridge": chosen.ridge * float(keep.square().mean()), "prior_scale": chosen.prior_scale}
    by_rows = DualMetric("layer", rows, **options)
    by_moments = PrimalMetric("layer", [x.T @ x for x in rows[:-1]], rows[-1].T @ rows[-1], **options)
    (delta, gains), (expected, expected_gains) = by_rows.solve(differences), by_moments.solve(differences)
    torch.testing.assert_close(delta, expected)
    torch.testing.assert_close(gains, expected_gains)
    torch.testing.assert_close(by_rows.matrix(), by_moments.matrix())
    for metric in (by_rows, by_moments):
        torch.testing.assert_close(metric.half(delta).square().sum(1), gains)
    for mine, theirs in zip(by_rows.ability_moments(), by_moments.ability_moments(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_pieces_and_their_order_do_not_matter() -> None:
    differences, ability, keep = problem(tokens=(9, 20), keep=11)
    whole = solve(moments_of(ability, keep), differences, SETTINGS[1]).delta
    torch.testing.assert_close(solve(moments_of(ability, keep, pieces=5), differences, SETTINGS[1]).delta, whole)


@pytest.mark.parametrize(("tokens", "keep"), [((2,), 3), ((30,), 40)])
@pytest.mark.parametrize("rows", [3, 7, 12])
def test_a_rank_is_as_good_as_a_numerical_optimizer_makes_it(rows: int, tokens, keep) -> None:
    _, ability, kept = problem(tokens=tokens, keep=keep)
    differences = [torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)]
    settings = SETTINGS[0]
    solution = solve(moments_of(ability, kept), differences, settings, max_rank=99)
    rank = 2
    left = solution.directions[:, :rank]
    best = left @ left.T @ solution.delta
    reached = float(objective(best, differences, ability, kept, **settings).sum())
    least = float(objective(solution.delta, differences, ability, kept, **settings).sum())
    torch.testing.assert_close(reached - least, float(solution.strengths[rank:].square().sum()), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(float(solution.strengths.square().sum()), float(solution.gains.sum()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # starts
        b = torch.randn(rows, rank, generator=generator, dtype=torch.float64, requires_grad=True)
        a = torch.randn(rank, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([a, b], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = objective(b @ a, differences, ability, kept, **settings).sum()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        assert closure().item() >= reached - 1e-8
    assert closure().item() == pytest.approx(reached, rel=1e-4)


def test_an_endless_weight_on_what_is_kept_leaves_its_outputs() -> None:
    differences, ability, keep = problem(tokens=(30,), keep=4)
    delta = solve(
        moments_of(ability, keep), differences, {"keep_weight": 1e12, "ridge": 1e-3, "prior_scale": 0.0}
    ).delta
    assert float((delta @ keep.T).abs().max()) < 1e-5
    assert float(delta.abs().max()) > 0.1


@pytest.mark.parametrize("tokens", [4, 30])
def test_without_ridge_and_data_to_keep_the_outputs_are_the_donors(tokens: int) -> None:
    differences, ability, _ = problem(tokens=(tokens,), keep=None)
    delta = solve(moments_of(ability, None), differences, {"ridge": 1e-12}).delta
    torch.testing.assert_close(delta @ ability[0].T, differences[0] @ ability[0].T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [(4,), (30, 2)])
def test_an_endless_ridge_interpolates(tokens) -> None:
    differences, ability, keep = problem(tokens=tokens, keep=3)
    delta = solve(moments_of(ability, keep), differences, {"ridge": 1e12, "prior_scale": 0.4}).delta
    torch.testing.assert_close(delta, 0.4 * sum(differences) / len(differences), rtol=1e-8, atol=1e-8)


def test_no_difference_is_no_change() -> None:
    differences, ability, keep = problem(tokens=(30,), keep=3)
    solution = solve(moments_of(ability, keep), [torch.zeros_like(differences[0])], SETTINGS[1], max_rank=3)
    assert not solution.delta.any()
    assert not solution.gains.any()
    assert not solution.strengths.any()


def test_inputs_that_are_zero_leave_the_prior() -> None:
    differences, ability, keep = problem(tokens=(3,), keep=3)
    solution = solve(moments_of([ability[0] * 0], keep * 0), differences, SETTINGS[1])
    torch.testing.assert_close(solution.delta, 0.4 * differences[0])


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    differences, ability, keep = problem(tokens=(30,), keep=40)
    differences = [torch.randn(23, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)]
    whole = solve(moments_of(ability, keep), differences, SETTINGS[0], max_rank=3)
    monkeypatch.setattr("act_peft.fitting.solution._BLOCK", 4 * WIDTH)
    parts = solve(moments_of(ability, keep), differences, SETTINGS[0], max_rank=3)
    torch.testing.assert_close(parts.delta, whole.delta)
    torch.testing.assert_close(parts.strengths, whole.strengths)
    torch.testing.assert_close(
        parts.directions @ parts.directions.T, whole.directions @ whole.directions.T, rtol=1e-9, atol=1e-9
    )


def test_float32_moments_of_wide_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_peft.fitting.moments._DOUBLE_WIDTH", 0)
    differences, ability, keep = problem(tokens=(30,), keep=40)
    exact = solve(moments_of(ability, keep), differences, SETTINGS[0]).delta
    rounded = solve(moments_of([ability[0].float()], keep.float()), differences, SETTINGS[0]).delta
    torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_not_finite() -> None:
    _, ability, keep = problem(tokens=(3,), keep=3)
    ability[0][1, 2] = float("inf")
    with pytest.raises(ActValueError, match=r"layer: got inputs that are not finite \(NaN or infinite\)"):
        moments_of(ability, keep).metric(FitSettings())


def test_a_module_that_no_token_reaches() -> None:
    _, _, keep = problem(tokens=(3,), keep=30)
    with pytest.raises(ActValueError, match=r"layer: no token of the ability's data reaches it.*\['layer'\]"):
        moments_of([None], keep).metric(FitSettings())


def test_a_ridge_that_is_lost_in_rounding() -> None:
    _, ability, keep = problem(tokens=(3,), keep=30)
    moments = moments_of([ability[0].repeat(9, 1)], keep * 0)
    with pytest.raises(ActValueError, match="layer: the second moments of its inputs cannot be solved with"):
        moments.metric(FitSettings(ridge=1e-300)).cholesky()
