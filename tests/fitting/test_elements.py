from __future__ import annotations

import pytest
import torch

from act_peft.errors import ActValueError
from act_peft.fitting.elements import ElementMoments
from act_peft.fitting.settings import FitSettings
from tests.fitting.oracle import least_squares, mean_square, objective

CHANNELS = 4
SETTINGS = [
    {"keep_weight": 1.0, "ridge": 0.03, "prior_scale": 0.0},
    {"keep_weight": 3.0, "ridge": 0.3, "prior_scale": 0.4},
]


def moments_of(sources, *, bias: bool) -> ElementMoments:
    moments = ElementMoments("norm", CHANNELS, num_donors=len(sources) - 1, has_bias=bias)
    for number, rows in enumerate(sources):
        for part in [] if rows is None else rows.split(3):
            moments.add_(number, part)
    return moments


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("has_keep", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("donors", [1, 2])
def test_every_channel_is_a_least_squares_fit(donors: int, bias: bool, has_keep: bool, settings) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    ability = [draw(10 + 5 * j, CHANNELS) * (1 + j) for j in range(donors)]
    keep = draw(8, CHANNELS) + 0.5 if has_keep else None
    differences = [draw(CHANNELS, 1 + bias) for _ in ability]
    moments = moments_of([*ability, keep], bias=bias)
    delta, gains = moments.solve(differences, FitSettings(**settings))

    # Each source's inputs are scaled by its mean over all channels, so channels are compared in one design: channel i
    # has its own inputs (n_i, 1), and block-diagonal rows make one problem of all channels.
    def inputs(rows: torch.Tensor, channel: int) -> torch.Tensor:
        own = rows[:, channel : channel + 1]
        return torch.cat((own, torch.ones_like(own)), 1) if bias else own

    squares = [torch.stack([inputs(rows, c) for c in range(CHANNELS)]).square().mean() for rows in ability]
    m = (
        sum(squares) / donors
        if keep is None
        else torch.stack([inputs(keep, c) for c in range(CHANNELS)]).square().mean()
    )
    for channel in range(CHANNELS):
        # Scaled so that the channel's own mean squares stand to each other as those of all channels do.
        mine = [inputs(rows, channel) for rows in ability]
        kept = None if keep is None else inputs(keep, channel)
        design, targets = [], []
        for difference, rows, square in zip(differences, mine, squares, strict=True):
            factor = (m / square / len(rows)) ** 0.5
            design.append(factor * rows)
            targets.append(factor * rows @ difference[channel])
        if kept is not None:
            design.append((settings["keep_weight"] / len(kept)) ** 0.5 * kept)
            targets.append(torch.zeros(len(kept), dtype=torch.float64))
        prior = settings["prior_scale"] * sum(d[channel] for d in differences) / donors
        root = (settings["ridge"] * m) ** 0.5
        design.append(root * torch.eye(1 + bias, dtype=torch.float64))
        targets.append(root * prior)
        phi, y = torch.cat(design), torch.cat(targets)
        expected = torch.linalg.lstsq(phi, y[:, None]).solution[:, 0]
        torch.testing.assert_close(delta[channel], expected)
        fall = y.square().sum() - (phi @ expected - y).square().sum()
        torch.testing.assert_close(gains[channel], fall)


def test_one_channel_is_a_linear_module_with_one_input() -> None:
    generator = torch.Generator().manual_seed(0)
    ability, keep = torch.randn(6, 1, generator=generator).double(), torch.randn(5, 1, generator=generator).double()
    difference = torch.tensor([[2.0]], dtype=torch.float64)
    moments = ElementMoments("norm", 1, num_donors=1, has_bias=False)
    moments.add_(0, ability)
    moments.add_(1, keep)
    delta, gains = moments.solve([difference], FitSettings(**SETTINGS[1]))
    torch.testing.assert_close(delta, least_squares([difference], [ability], keep, **SETTINGS[1]))
    zero = objective(torch.zeros(1, 1).double(), [difference], [ability], keep, **SETTINGS[1])
    torch.testing.assert_close(gains, zero - objective(delta, [difference], [ability], keep, **SETTINGS[1]))
    assert mean_square(keep) > 0


def test_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, CHANNELS, generator=generator).double()
    difference = torch.randn(CHANNELS, 1, generator=generator).double()
    solve = lambda keep, **settings: moments_of([rows, keep], bias=False).solve([difference], FitSettings(**settings))[
        0
    ]
    torch.testing.assert_close(solve(None, ridge=1e-12), difference)
    torch.testing.assert_close(solve(rows, ridge=1e12, prior_scale=0.4), 0.4 * difference)
    assert float(solve(rows, keep_weight=1e12).abs().max()) < 1e-10
    torch.testing.assert_close(solve(rows, ridge=1e-12), difference / 2)


def test_inputs_that_are_not_finite() -> None:
    moments = moments_of([torch.tensor([[1.0, 2.0, float("nan"), 1.0]]), None], bias=False)
    with pytest.raises(ActValueError, match="norm: got inputs that are not finite"):
        moments.solve([torch.ones(CHANNELS, 1).double()], FitSettings())


def test_a_module_that_no_token_reaches() -> None:
    moments = moments_of([None, torch.ones(2, CHANNELS)], bias=False)
    with pytest.raises(ActValueError, match="norm: no token of the ability's data reaches it"):
        moments.solve([torch.ones(CHANNELS, 1).double()], FitSettings())
