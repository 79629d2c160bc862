"""The arithmetic of combining, against loops over channels in float64 and against PEFT's own functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from peft.utils import merge_utils

from act_peft import ActTypeError, ActValueError
from act_peft.combination.rules import (
    CombinationType,
    MajoritySign,
    WeightedRows,
    combined_rows,
    make_rule,
    union_index,
)

WIDTH = 6
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def part(index, weight=1.0, *, seed=0, dtype=torch.float32):
    index = torch.tensor(index, dtype=torch.int64)
    rows = torch.randn(len(index), WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return WeightedRows(index, rows, weight)


def three():
    """Channels of one, of two and of all three of the adapters."""
    return [part([0, 2, 5, 7], 0.5, seed=1), part([1, 2, 5, 9], -1.5, seed=2), part([2, 3, 7, 9], 2.0, seed=3)]


def by_loops(parts, combine_values):
    """Channel -> the row that `combine_values` makes of the (weight, row) pairs of its adapters."""
    rows = {}
    for channel in sorted({int(c) for one in parts for c in one.index}):
        owners = [
            (one.weight, one.rows[one.index.tolist().index(channel)].double().tolist())
            for one in parts
            if channel in one.index
        ]
        rows[channel] = combine_values(owners)
    return rows


def summed(owners):
    return [sum(weight * row[i] for weight, row in owners) for i in range(WIDTH)]


def averaged(owners):
    return [value / len(owners) for value in summed(owners)]


def first(owners):
    return summed(owners[:1])


def larger(owners):
    return summed([max(owners, key=lambda owner: math.sqrt(sum((owner[0] * x) ** 2 for x in owner[1])))])


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("linear", summed), ("sum", summed), ("mean", averaged), ("first", first), ("larger", larger)],
)
def test_every_channel_is_what_a_loop_makes_of_it(name, oracle):
    expected = by_loops(three(), oracle)
    assert union_index([one.index for one in three()]).tolist() == list(expected)
    combined = combined_rows(three(), make_rule(name))
    torch.testing.assert_close(combined, torch.tensor(list(expected.values())))


@pytest.mark.parametrize("name", ["linear", "mean"])
def test_the_order_does_not_matter_for_sum_and_mean(name):
    parts = [part(range(40), weight, seed=seed) for seed, weight in enumerate((0.3, -1.1, 1e4, 7.0))]
    expected = combined_rows(parts, make_rule(name))
    for order in itertools.permutations(parts):
        assert torch.equal(combined_rows(order, make_rule(name)), expected)


def test_the_larger_of_equal_changes_is_the_first():
    a, b = part([3], 1.0), part([3], -1.0)
    assert torch.equal(combined_rows([a, b], make_rule("larger")), a.rows)
    assert torch.equal(combined_rows([b, a], make_rule("larger")), -a.rows)


def settings(name, **more):
    return {"density": 0.5, **({"majority_sign_method": "frequency"} if "ties" in name else {}), **more}


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_equal_channels_it_is_peft_s_own_function(name, dtype):
    parts = [part(range(8), weight, seed=seed, dtype=dtype) for seed, weight in enumerate((0.5, -1.5, 2.0))]
    torch.manual_seed(0)
    expected = getattr(merge_utils, name)(
        [one.rows for one in parts], torch.tensor([one.weight for one in parts], dtype=dtype), **settings(name)
    )
    torch.manual_seed(0)
    combined = combined_rows(parts, make_rule(name, **settings(name)))
    assert torch.equal(combined, expected)
    assert combined.dtype == dtype


@pytest.mark.parametrize("name", PRUNING)
def test_only_shared_channels_are_pruned(name):
    a, b = part([0, 2, 4, 6, 8], 0.5, seed=1), part([1, 2, 6, 8], -1.5, seed=2)
    torch.manual_seed(3)
    shared = getattr(merge_utils, name)(
        [a.rows[[1, 3, 4]], b.rows[[1, 2, 3]]], torch.tensor([0.5, -1.5]), **settings(name)
    )
    torch.manual_seed(3)
    combined = combined_rows([a, b], make_rule(name, **settings(name)))
    alone = {0: 0.5 * a.rows[0], 1: -1.5 * b.rows[0], 3: 0.5 * a.rows[2]}  # position in the union 0 1 2 4 6 8
    for place, row in alone.items():
        assert torch.equal(combined[place], row)
    assert torch.equal(combined[[2, 4, 5]], shared)
    assert (shared == 0).any()


def test_every_set_of_sharers_is_pruned_for_itself():
    combined = combined_rows(three(), make_rule("magnitude_prune", density=0.5))
    a, b, c = three()
    pair = merge_utils.magnitude_prune([a.rows[[2]], b.rows[[2]]], torch.tensor([0.5, -1.5]), 0.5)
    every = merge_utils.magnitude_prune([a.rows[[1]], b.rows[[1]], c.rows[[0]]], torch.tensor([0.5, -1.5, 2.0]), 0.5)
    union = union_index([one.index for one in three()]).tolist()
    assert torch.equal(combined[[union.index(5)]], pair)
    assert torch.equal(combined[[union.index(2)]], every)


def test_ties_by_hand():
    a = WeightedRows(torch.tensor([4]), torch.tensor([[3.0, -1.0, 4.0, 0.1]]), 1.0)
    b = WeightedRows(torch.tensor([4]), torch.tensor([[1.0, 5.0, -6.0, 0.2]]), 2.0)
    # Kept of a: 3 and 4, of b: 5 and -6. Elected signs: +, +, -. Mean of the agreeing ones, weighted.
    combined = combined_rows([a, b], make_rule("ties", density=0.5))
    assert combined.tolist() == [[3.0, 10.0, -12.0, 0.0]]


def test_density_one_elects_signs_and_prunes_nothing():
    a, b = part([0, 1], 1.0, seed=1), part([0, 1], 1.0, seed=2)
    combined = combined_rows([a, b], make_rule("ties", density=1))  # no warning of PEFT's either
    agree = a.rows.sign() == b.rows.sign()
    assert torch.equal(combined[agree], ((a.rows + b.rows) / 2)[agree])
    stronger = torch.where(a.rows.abs() > b.rows.abs(), a.rows, b.rows)
    assert torch.equal(combined[~agree], stronger[~agree])


def test_deltas_of_half_precision_are_added_in_float32():
    parts = [part([0, 1], 0.3, seed=1, dtype=torch.bfloat16), part([1], 0.7, seed=2, dtype=torch.float16)]
    combined = combined_rows(parts, make_rule("linear"))
    assert combined.dtype == torch.float32
    expected = by_loops(parts, summed)
    torch.testing.assert_close(combined, torch.tensor(list(expected.values())))


@pytest.mark.parametrize("name", [choice.value for choice in CombinationType])
def test_one_adapter_alone_is_only_weighted(name):
    rule = make_rule(name, density=0.1 if name in PRUNING else None)
    one = part([1, 5, 6], -0.25)
    assert torch.equal(combined_rows([one], rule), -0.25 * one.rows)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"combination_type": "svd"}, ActValueError, "got 'svd', which combines the factors of LoRA adapters"),
        ({"combination_type": "cat"}, ActValueError, "got 'cat', .* rows have no factors; .*take 'linear'"),
        ({"combination_type": "ties_svd", "density": 0.5}, ActValueError, "without '_svd'"),
        ({"combination_type": "slerp"}, ActValueError, "combination_type: got 'slerp', expected one of 'linear', 's"),
        ({"combination_type": "linear", "density": 0.5}, ActValueError, "density: got 0.5 .*prunes nothing"),
        ({"combination_type": "ties"}, ActValueError, r"density: got none, expected the share .* 'ties' keeps"),
        (
            {"combination_type": "ties", "density": 0},
            ActValueError,
            "density: got 0, expected a number above 0",
        ),
        ({"combination_type": "ties", "density": 1.5}, ActValueError, "density: got 1.5"),
        ({"combination_type": "ties", "density": math.nan}, ActValueError, "density: got nan"),
        ({"combination_type": "ties", "density": "half"}, ActTypeError, "density: got 'half'"),
        ({"combination_type": "ties", "density": True}, ActTypeError, "density: got True"),
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "vote"},
            ActValueError,
            "majority_sign_method: got 'vote', expected one of 'total', 'frequency'",
        ),
        (
            {"combination_type": "dare_linear", "density": 0.5, "majority_sign_method": "frequency"},
            ActValueError,
            "majority_sign_method: got 'frequency' with combination_type='dare_linear', which elects no sign",
        ),
    ],
)
def test_bad_settings_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        make_rule(**arguments)


def test_members_are_taken_as_their_values():
    assert make_rule(CombinationType.TIES, density=0.5, majority_sign_method=MajoritySign.FREQUENCY) == make_rule(
        "ties", density=0.5, majority_sign_method="frequency"
    )
