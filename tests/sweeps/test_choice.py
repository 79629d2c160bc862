from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from act_peft.sweeps.choice import allowed_rows, loss_front, recommend_by_loss
from act_peft.sweeps.heldout import SampleSums, SkillResult
from act_peft.sweeps.methods import Method
from act_peft.sweeps.rows import SweepRow


def result(losses, tokens=10.0):
    """Of samples with these mean losses."""
    counts = torch.full((len(losses),), tokens, dtype=torch.float64)
    means = torch.tensor(losses, dtype=torch.float64)
    return SkillResult(float(means.mean()), 0.5, SampleSums(means * tokens, counts * 0.5, counts))


def row(method, ability, *rises, noise=0.0, density=1.0):
    """Samples of the ability are spread by `noise` around their mean, in a way of the method's own."""
    spread = [noise, -noise] if method.level % 2 else [-noise, noise]
    keep = {f"skill {number}": result([2.0 + rise, 2.0 + rise]) for number, rise in enumerate(rises)}
    return SweepRow(result([ability + spread[0], ability + spread[1]]), keep, density, 0.5, 1, method, {"a": 1.0})


BASE = row(Method.BASE, 1.0, 0.0, 0.0, density=0.0)


def test_the_lowest_loss_within_the_limit():
    rows = [
        row(Method.INTERPOLATION, 0.8, 0.02, 0.03),
        row(Method.FITTED, 0.6, 0.03, 0.0),
        row(Method.FITTED, 0.5, 0.0, 0.031),
    ]
    assert recommend_by_loss(rows, BASE, max_keep_loss=0.03) is rows[1]
    assert recommend_by_loss(rows, BASE, max_keep_loss=0.04) is rows[2]
    assert recommend_by_loss(rows[:1], BASE, max_keep_loss=0.01) is None
    assert allowed_rows(rows, BASE, max_keep_loss=0.03) == rows[:2]


def test_inside_the_noise_the_simpler_is_taken():
    fitted, simple = row(Method.FITTED, 0.5, 0.0, 0.0, noise=0.1), row(Method.INTERPOLATION, 0.55, 0.0, 0.0, noise=0.1)
    assert simple.ability.rise_over(fitted.ability) == (pytest.approx(0.05), pytest.approx(0.2))
    assert recommend_by_loss([fitted, simple], BASE, max_keep_loss=0.0) is simple
    clear = row(Method.INTERPOLATION, 0.75, 0.0, 0.0, noise=0.1)
    assert recommend_by_loss([fitted, clear], BASE, max_keep_loss=0.0) is fitted
    small = row(Method.FITTED, 0.95, 0.0, 0.0, noise=0.1)
    assert recommend_by_loss([small], BASE, max_keep_loss=0.0) is None


def test_of_unknown_noise_nothing_is_taken():
    one = SweepRow(result([0.5]), BASE.keep, 1.0, 1.0, 1, Method.FITTED, {})
    base = SweepRow(result([1.0]), BASE.keep, 0.0, 0.0, 0, Method.BASE)
    assert one.ability.rise_over(base.ability) == (-0.5, None)
    assert recommend_by_loss([one], base, max_keep_loss=1.0) is None
    unknown = SweepRow(SkillResult(0.5, 0.5), BASE.keep, 1.0, 1.0, 1, Method.FITTED, {})
    assert recommend_by_loss([unknown], BASE, max_keep_loss=1.0) is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_not_finite(broken):
    bad = row(Method.FITTED, broken, 0.0, 0.0)
    lost = row(Method.FITTED, 0.1, broken, 0.0)
    good = row(Method.FITTED, 0.5, 0.0, 0.0)
    assert recommend_by_loss([bad, lost, good], BASE, max_keep_loss=0.1) is good
    assert recommend_by_loss([bad], row(Method.BASE, broken, 0.0, 0.0), max_keep_loss=0.1) is None
    assert loss_front([bad, lost, good], BASE) == (good,)


@pytest.mark.parametrize("seed", range(100))
def test_never_worse_than_interpolation(seed):
    generator = random.Random(seed)
    methods = [method for method in Method if method is not Method.BASE]
    rows = [
        row(
            method,
            generator.uniform(0.5, 1.1),
            generator.uniform(-0.01, 0.06),
            generator.uniform(-0.01, 0.06),
            noise=generator.uniform(0, 0.1),
        )
        for method in (*methods, *methods)
    ]
    allowed = [row for row in rows if row.keep_rise(BASE) <= 0.03]
    best = recommend_by_loss(rows, BASE, max_keep_loss=0.03)
    interpolations = [row for row in allowed if row.method is Method.INTERPOLATION]
    assert best is None or best in allowed
    for one in interpolations if best is not None else ():
        assert best.ability.loss <= one.ability.loss
    lowest = min((row.ability.loss for row in allowed), default=1.0)
    if best is None and lowest < 1:  # within the noise of the base
        winner = next(row for row in allowed if row.ability.loss == lowest)
        rise, error = BASE.ability.rise_over(winner.ability)
        assert rise < error
    if best is not None:
        assert all(
            other.ability.loss >= best.ability.loss for other in allowed if other.method.level <= best.method.level
        )


@pytest.mark.parametrize("seed", range(20))
def test_the_front_by_losses(seed):
    generator = random.Random(seed)
    rows = [row(Method.FITTED, generator.randint(0, 3) / 4, generator.randint(0, 3) / 4) for _ in range(8)]
    base = row(Method.BASE, 0.5, 0.0)
    front = loss_front(rows, base)
    points = [(one.ability.loss, one.keep_rise(base)) for one in front]
    assert points == sorted(set(points), reverse=True)
    for one, other in itertools.product(rows, front):
        mine, theirs = (one.ability.loss, one.keep_rise(base)), (other.ability.loss, other.keep_rise(base))
        assert not (mine[0] <= theirs[0] and mine[1] <= theirs[1] and mine != theirs)
    for one in rows:
        assert any(a <= one.ability.loss and b <= one.keep_rise(base) for a, b in points)
