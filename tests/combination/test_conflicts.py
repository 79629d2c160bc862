"""The figures of conflicts against loops over single numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from act_peft.combination.conflicts import Conflicts
from act_peft.combination.rules import WeightedRows


def part(index, rows, weight=1.0):
    return WeightedRows(torch.tensor(index, dtype=torch.int64), torch.tensor(rows), weight)


def random_part(seed, *, weight):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(3000, generator=generator)[:2000].sort().values
    return WeightedRows(index, torch.randn(2000, 3, generator=generator), weight)


def by_loops(first, second):
    """Shared channels, cosine and cancelled share, number by number."""
    place = {int(channel): k for k, channel in enumerate(second.index)}
    shared, dot, square_a, square_b, moved, remaining = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for k, channel in enumerate(first.index.tolist()):
        if channel not in place:
            continue
        shared += 1
        for x, y in zip(first.rows[k].tolist(), second.rows[place[channel]].tolist(), strict=True):
            a, b = first.weight * x, second.weight * y
            dot, square_a, square_b = dot + a * b, square_a + a * a, square_b + b * b
            moved, remaining = moved + abs(a) + abs(b), remaining + abs(a + b)
    return shared, dot / math.sqrt(square_a * square_b), 1 - remaining / moved


def test_figures_are_those_of_loops():
    parts = [random_part(1, weight=0.5), random_part(2, weight=-2.0)]
    conflicts = Conflicts(["a", "b"])
    conflicts.add_("m", parts)
    (found,) = conflicts.report().conflicts
    assert found.channels == (2000, 2000)
    assert (found.shared, found.cosine, found.cancelled) == pytest.approx(by_loops(*parts))


def test_totals_are_of_all_numbers_together_and_pairs_are_apart():
    conflicts = Conflicts(["a", "b", "c"])
    conflicts.add_("one", [part([0, 1], [[1.0], [2.0]]), part([1, 2], [[-2.0], [9.0]]), None])
    conflicts.add_("two", [part([4], [[3.0]]), part([4], [[1.0]]), part([5], [[1.0]])])
    report = conflicts.report()
    assert [(c.module, c.adapters, c.shared) for c in report.conflicts] == [
        ("one", ("a", "b"), 1),
        ("two", ("a", "b"), 1),
    ]
    ab, ac, bc = report.totals
    assert (ab.shared, ab.channels) == (2, (3, 3))
    assert ab.cosine == pytest.approx((-4 + 3) / (math.sqrt(4 + 9) * math.sqrt(4 + 1)))
    assert ab.cancelled == pytest.approx(1 - (0 + 4) / (4 + 4))
    for pair in (ac, bc):
        assert (pair.shared, pair.cosine, pair.cancelled) == (0, None, None)
    assert (ac.channels, bc.channels) == ((3, 1), (3, 1))


def test_the_ends_of_the_scale():
    for sign, cosine, cancelled in ((1.0, 1.0, 0.0), (-1.0, -1.0, 1.0)):
        conflicts = Conflicts(["a", "b"])
        one = random_part(0, weight=0.1)
        conflicts.add_("m", [one, WeightedRows(one.index, sign * one.rows, 0.1)])
        (total,) = conflicts.report().totals
        assert (total.cosine, total.cancelled) == pytest.approx((cosine, cancelled), abs=1e-12)
        assert -1 <= total.cosine <= 1
    conflicts = Conflicts(["a", "b"])
    conflicts.add_("m", [part([0], [[1.0]]), part([0], [[0.0]])])
    (total,) = conflicts.report().totals
    assert (total.cosine, total.cancelled) == (None, 0.0)


def test_a_report_is_a_table_and_json():
    conflicts = Conflicts(["a", "b"])
    conflicts.add_("lin", [part([0, 1], [[1.0], [2.0]]), part([1], [[-2.0]])])
    report = conflicts.report()
    assert str(report).splitlines() == [
        "module       adapters  shared  cosine  cancelled",
        "lin          a × b     1 of 1  -1.000     100.0%",
        "all modules  a × b     1 of 1  -1.000     100.0%",
    ]
    figures = {"adapters": ["a", "b"], "channels": [2, 1], "shared": 1, "cosine": -1.0, "cancelled": 1.0}
    assert json.loads(json.dumps(report.to_dict())) == {"modules": {"lin": [figures]}, "totals": [figures]}
    assert report.only_totals().to_dict() == {"modules": {}, "totals": [figures]}


def test_one_adapter_has_no_conflicts():
    conflicts = Conflicts(["a"])
    conflicts.add_("lin", [part([0], [[1.0]])])
    assert conflicts.report().totals == ()
