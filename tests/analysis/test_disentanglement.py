from __future__ import annotations

import pytest
import torch

from act_peft.analysis import measure_disentanglement
from act_peft.channels.masks import ChannelMask
from act_peft.errors import ActTypeError, ActValueError

COUNTS = {"a": 6, "b": 4}
MASKS = {
    "de": ChannelMask({"a": [0, 1, 2], "b": [0]}, COUNTS),
    "es": ChannelMask({"a": [2, 3], "b": [0, 1]}, COUNTS),
    "fr": ChannelMask({"a": [5]}, COUNTS),
}


def test_numbers_by_hand():
    found = measure_disentanglement(MASKS)
    assert found.names == ("de", "es", "fr")
    assert found.sizes == (4, 4, 1)
    assert found.unique == (0.5, 0.5, 1.0)
    assert (found.common, found.union) == (0, 7)
    for a, one in enumerate(MASKS.values()):
        for b, other in enumerate(MASKS.values()):
            assert found.jaccard[a][b] == pytest.approx(one.jaccard(other))
    expected = 3 * 2 / 6 + 1 * 2 / 4
    assert found.chance[0][1] == pytest.approx(expected / (8 - expected))
    assert found.mean_jaccard == pytest.approx(2 / 6 / 3)
    assert [row["its own"] for row in found.records()] == [0.5, 0.5, 1.0]
    assert found.records()[0]["es"] == pytest.approx(2 / 6)


def test_chance_against_random_masks(random_mask):
    counts = {"a": (5, 12), "b": (2, 9)}, {"a": (3, 12), "b": (6, 9)}, {"a": (6, 12), "b": (1, 9)}
    given = measure_disentanglement({str(n): random_mask(n, c) for n, c in enumerate(counts)})
    drawn = [
        measure_disentanglement({str(n): random_mask(3 * seed + n, c) for n, c in enumerate(counts)}).unique
        for seed in range(300)
    ]
    means = torch.tensor(drawn).mean(0).tolist()
    assert given.unique_by_chance == pytest.approx(means, abs=0.04)


def test_equal_and_disjoint_masks():
    same = measure_disentanglement({"x": MASKS["de"], "y": MASKS["de"]})
    assert (same.unique, same.common, same.mean_jaccard) == ((0, 0), 4, 1)
    apart = measure_disentanglement({"x": MASKS["de"], "y": MASKS["fr"]})
    assert (apart.unique, apart.common, apart.mean_jaccard) == ((1, 1), 0, 0)
    nothing = measure_disentanglement({"x": ChannelMask({}, COUNTS), "y": MASKS["fr"]})
    assert (nothing.unique, nothing.unique_by_chance) == ((0, 1), (0, 1))


def test_wrong_arguments():
    with pytest.raises(ActValueError, match="masks: got 1, expected at least two"):
        measure_disentanglement({"x": MASKS["de"]})
    with pytest.raises(ActValueError, match="masks: got none, expected at least one"):
        measure_disentanglement({})
    with pytest.raises(ActTypeError, match="masks: got list, expected a dict"):
        measure_disentanglement(list(MASKS.values()))
    with pytest.raises(ActTypeError, match="masks: got dict, expected a dict of ChannelMask"):
        measure_disentanglement({"x": {"a": [0]}})
