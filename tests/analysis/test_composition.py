from __future__ import annotations

from act_peft.analysis import measure_composition
from act_peft.channels.masks import ChannelMask

COUNTS = {"layers.0.up": 10, "layers.0.down": 10, "layers.1.up": 10, "layers.1.down": 10, "head": 20}


def test_counts_by_hand():
    mask = ChannelMask({"layers.0.up": [0, 1, 2], "layers.1.up": [5], "layers.1.down": [1, 2], "head": [0]}, COUNTS)
    found = measure_composition(mask)
    assert {kind: (p.selected, p.channels) for kind, p in found.kinds.items()} == {
        "up": (4, 20),
        "down": (2, 20),
        "head": (1, 20),
    }
    assert {layer: (p.selected, p.channels) for layer, p in found.layers.items()} == {
        "layer 0": (3, 20),
        "layer 1": (3, 20),
        "head": (1, 20),
    }
    assert found.cells["layer 0", "down"].selected == 0
    assert found.cells["layer 1", "down"].density == 0.2
    assert found.title == "57% of the 7 selected channels are up"
    assert found.dominant == "up"
    assert found.warning.startswith(
        "57% of the selected channels are up, which has 33% of all channels (scope='module"
    )
    assert f"warning: {found.warning}" in str(found)


def test_half_is_not_more_than_half():
    found = measure_composition(ChannelMask({"layers.0.up": [0, 1], "layers.0.down": [1], "head": [0]}, COUNTS))
    assert found.dominant is None
    assert found.title == "no kind of module dominates the mask: at most 50% of the 4 selected channels are up"
    assert found.warning is None
    assert found.notes == ()


def test_an_empty_mask_and_a_single_kind():
    empty = measure_composition(ChannelMask({}, COUNTS))
    assert empty.title == "none of 60 channels is selected"
    assert empty.warning is None
    assert empty.records()[0]["share of mask"] == 0
    assert measure_composition(ChannelMask({"m": [0]}, {"m": 4})).warning is None  # there is no other kind
