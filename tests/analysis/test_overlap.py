from __future__ import annotations

import itertools
import math

import pytest
import torch

from act_peft.analysis import compare_masks
from act_peft.channels.masks import ChannelMask
from act_peft.errors import ActTypeError, ActValueError

COUNTS = {"a": 4, "b": 3}
FIRST = ChannelMask({"a": [0, 1], "b": [0, 2]}, COUNTS)
SECOND = ChannelMask({"a": [1, 2, 3], "b": [2]}, COUNTS)


def all_shared(first, second):
    """What every pair of permuted masks shares; each pair is equally likely, so one side may stay as it is."""
    found = []
    modules = list(first)
    choices = [itertools.combinations(range(first.num_channels[m]), len(second[m])) for m in modules]
    for chosen in itertools.product(*(list(choice) for choice in choices)):
        found.append(sum(len(set(c) & set(first[m].tolist())) for m, c in zip(modules, chosen, strict=True)))
    return found


def test_counts_and_chance_against_all_permutations():
    found = compare_masks(FIRST, SECOND, permutations=20_000)
    every = all_shared(FIRST, SECOND)
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((shared - mean) ** 2 for shared in every) / len(every))
    assert (found.first, found.second, found.shared) == (4, 4, 2)
    assert found.jaccard == FIRST.jaccard(SECOND) == 2 / 6
    assert found.containment == (0.5, 0.5)
    assert found.expected == pytest.approx(mean)
    assert found.z == pytest.approx((2 - mean) / deviation)
    assert found.p_value == pytest.approx(sum(shared >= 2 for shared in every) / len(every), abs=0.01)
    assert found.chance == pytest.approx(mean / (8 - mean))
    assert found == compare_masks(FIRST, SECOND, permutations=20_000)


def test_p_values_of_random_masks_are_uniform(random_mask):
    """Kolmogorov-Smirnov: 400 uniform values are farther than .082 from uniform once in a hundred times.

    What two masks share is a whole number, so a p-value may also be too large by the chance of one of them (.03).
    """
    counts = {f"layers.{i}.up": (60, 200) for i in range(20)}
    found = sorted(
        compare_masks(random_mask(2 * n, counts), random_mask(2 * n + 1, counts), permutations=199).p_value
        for n in range(400)
    )
    steps = [(n / 400, (n + 1) / 400) for n in range(400)]
    assert max(max(high - p, p - low) for p, (low, high) in zip(found, steps, strict=True)) < 0.082 + 0.03


def test_known_masks():
    same = compare_masks(FIRST, FIRST, permutations=99)
    assert (same.jaccard, same.containment) == (1, (1, 1))
    counts = {f"m{i}": (10, 100) for i in range(8)}
    mask = ChannelMask({name: range(few) for name, (few, _) in counts.items()}, {n: s for n, (_, s) in counts.items()})
    other = ChannelMask({name: range(few, 2 * few) for name, (few, _) in counts.items()}, mask.num_channels)
    apart = compare_masks(mask, other)
    assert (apart.shared, apart.expected, apart.p_value) == (0, pytest.approx(8.0), 1)
    assert apart.z < -2
    assert apart.title == "the masks share 0% of their channels, no more than chance (5.3%)"
    assert compare_masks(mask, mask).title == "the masks share 100% of their channels, more than chance (5.3%)"
    assert compare_masks(mask, mask).p_value == 1 / 1000


def test_masks_that_cannot_vary():
    everything = ChannelMask({"a": range(4)}, {"a": 4, "b": 1})
    found = compare_masks(everything, ChannelMask({"b": [0]}, {"a": 4, "b": 1}))
    assert (found.shared, found.z, found.p_value, found.jaccard) == (0, None, 1, 0)
    nothing = ChannelMask({}, COUNTS)
    assert compare_masks(nothing, nothing).jaccard == 1
    assert compare_masks(nothing, FIRST).containment == (1, 0)


def test_masks_over_different_modules():
    found = compare_masks(FIRST, ChannelMask({"c": [0]}, {"c": 2, "a": 4}))
    assert (found.shared, found.second, found.expected) == (0, 1, 0)


def test_wrong_arguments():
    with pytest.raises(ActTypeError, match="masks: got Tensor, expected a dict of ChannelMask"):
        compare_masks(FIRST, torch.ones(3))
    with pytest.raises(
        ActValueError, match="a: got 4 channels in one mask and 5 in second, expected masks of the sam"
    ):
        compare_masks(FIRST, ChannelMask({}, {"a": 5}))
    with pytest.raises(ActValueError, match="permutations: got 0"):
        compare_masks(FIRST, SECOND, permutations=0)
    with pytest.raises(ActValueError, match="seed: got -1"):
        compare_masks(FIRST, SECOND, seed=-1)
