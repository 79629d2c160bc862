import copy
import dataclasses
import hashlib
import pickle

import numpy
import pytest
import torch

from act_peft.channels.masks import ChannelMask
from act_peft.disk import tensorfile
from act_peft.errors import ActTypeError, ActValueError

COUNTS = {"z.up": 6, "a.norm": 3, "head": 4}
LEFT = {"z.up": [0, 2, 5], "head": [1]}
RIGHT = {"z.up": [5, 3, 2], "a.norm": [0]}


def indices(mask):
    return {name: index.tolist() for name, index in mask.items()}


@pytest.fixture
def left():
    return ChannelMask.from_dict(LEFT, COUNTS)


@pytest.fixture
def right():
    return ChannelMask.from_dict(RIGHT, COUNTS)


def test_holds_every_candidate_in_order(left):
    assert list(left) == list(COUNTS)
    assert len(left) == 3
    assert "a.norm" in left
    assert "b" not in left
    assert indices(left) == {"z.up": [0, 2, 5], "a.norm": [], "head": [1]}
    assert all(index.dtype == torch.int64 and index.device.type == "cpu" for index in left.values())
    assert dict(left.num_channels) == COUNTS
    assert left.num_selected == 4
    assert left.density == 4 / 13


@pytest.mark.parametrize(
    "channels",
    [
        [5, 0, 2],
        (0, 2, 5),
        {0, 2, 5},
        range(0, 6, 2),
        torch.tensor([2, 5, 0], dtype=torch.int32),
        torch.tensor([5, 2, 0], dtype=torch.uint8),
        numpy.array([5, 2, 0]),
    ],
)
def test_any_order_and_integer_type_is_sorted(channels):
    index = ChannelMask({"m": channels}, {"m": 6})["m"]
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(int(c) for c in channels)


def test_the_boundaries_are_channels():
    assert ChannelMask({"m": [0, 5]}, {"m": 6})["m"].tolist() == [0, 5]
    assert ChannelMask({"m": range(6)}, {"m": 6}).density == 1


def test_it_cannot_be_changed(left):
    given = torch.tensor([1, 0])
    mask = ChannelMask({"m": given}, {"m": 2})
    given.fill_(7)
    mask["m"].fill_(9)
    assert mask["m"].tolist() == [0, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        left.density = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        left._channels = {}
    with pytest.raises(TypeError):
        left.num_channels["head"] = 9


def test_set_algebra(left, right):
    assert indices(left | right) == {"z.up": [0, 2, 3, 5], "a.norm": [0], "head": [1]}
    assert indices(left & right) == {"z.up": [2, 5], "a.norm": [], "head": []}
    assert indices(left - right) == {"z.up": [0], "a.norm": [], "head": [1]}
    assert left | right == right | left
    assert left | left == left
    assert (left - left).num_selected == 0
    assert indices(left) == {"z.up": [0, 2, 5], "a.norm": [], "head": [1]}


def test_set_algebra_against_python_sets():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.randperm(50, generator=generator)[:20].tolist() for _ in range(2))
        one, other = ChannelMask({"m": a}, {"m": 50}), ChannelMask({"m": b}, {"m": 50})
        assert (one | other)["m"].tolist() == sorted(set(a) | set(b))
        assert (one & other)["m"].tolist() == sorted(set(a) & set(b))
        assert (one - other)["m"].tolist() == sorted(set(a) - set(b))
        assert one.jaccard(other) == len(set(a) & set(b)) / len(set(a) | set(b))


def test_masks_of_other_candidates_of_the_same_model_combine(left):
    other = ChannelMask({"head": [1, 2], "new": [0]}, {"head": 4, "new": 2})
    assert indices(left | other) == {"z.up": [0, 2, 5], "a.norm": [], "head": [1, 2], "new": [0]}
    assert indices(left & other) == {"z.up": [], "a.norm": [], "head": [1], "new": []}
    assert indices(other - left) == {"head": [2], "new": [0], "z.up": [], "a.norm": []}
    assert dict((left | other).num_channels) == {**COUNTS, "new": 2}


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__sub__", "jaccard"])
def test_masks_of_different_models_do_not_combine(left, operation):
    other = ChannelMask({}, {**COUNTS, "head": 5})
    with pytest.raises(
        ActValueError,
        match=r"head: got 4 channels in one mask and 5 in the other, .* \(1 of 3 common modules differ\)",
    ):
        getattr(left, operation)(other)


def test_jaccard(left, right):
    assert left.jaccard(right) == 2 / 6
    assert left.jaccard(left) == 1
    empty = ChannelMask({}, COUNTS)
    assert left.jaccard(empty) == 0
    assert empty.jaccard(empty) == 1
    with pytest.raises(ActTypeError, match=r"jaccard: got dict, expected a ChannelMask"):
        left.jaccard(LEFT)


def test_other_types_do_not_combine(left):
    for operation in ("__or__", "__and__", "__sub__"):
        assert getattr(left, operation)(LEFT) is NotImplemented
    with pytest.raises(TypeError):
        left | LEFT


def test_equality(left, right):
    assert left == ChannelMask({"head": [1], "z.up": [5, 2, 0]}, dict(reversed(COUNTS.items())))
    assert left != right
    assert left != ChannelMask(LEFT, {**COUNTS, "head": 5})
    assert left != ChannelMask(LEFT, {**COUNTS, "more": 5})
    assert left != LEFT


def test_repr(left):
    assert repr(left) == "ChannelMask(4 of 13 channels in 2 of 3 modules, density 0.3077)"


def test_copies_and_pickles(left):
    for other in (copy.deepcopy(left), copy.copy(left), pickle.loads(pickle.dumps(left))):
        assert other == left
        assert list(other) == list(left)


def test_a_mask_without_modules():
    assert ChannelMask({}, {}).density == 0


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        ([-1, 2], ActValueError, r"m: got channel -1, expected 0 to 5 \(the module has 6 channels\)"),
        ([0, 6], ActValueError, r"m: got channel 6, expected 0 to 5"),
        ([3, 1, 3], ActValueError, r"m: got channel 3 more than once"),
        ([0.0, 1.0], ActTypeError, r"m: got torch.float32, expected integer indices"),
        (torch.empty(0), ActTypeError, r"m: got torch.float32, expected integer indices"),
        ([1j], ActTypeError, r"m: got torch.complex64, expected integer indices"),
        ([True, False], ActTypeError, r"m: got torch.bool, expected integer indices \(pass `flags"),
        (torch.zeros(2, 2, dtype=torch.int64), ActTypeError, r"m: got channels of shape \[2, 2\], expected \[K\]"),
        (torch.tensor(1), ActTypeError, r"m: got channels of shape \[\], expected \[K\]"),
        ("12", ActTypeError, r"m: got '12', expected a flat collection of ints"),
        (3, ActTypeError, r"m: got 3, expected a flat collection of ints"),
        ([2**70], ActTypeError, r"m: got \[1180591620717411303424\], expected a flat collection of ints"),
    ],
)
def test_wrong_channels_are_refused(channels, error, message):
    with pytest.raises(error, match=message):
        ChannelMask({"m": channels}, {"m": 6})


def test_a_module_without_count_is_refused():
    with pytest.raises(ActValueError, match=r"b: has no entry in num_channels, .* \(1 of 2 modules"):
        ChannelMask.from_dict({"a": [0], "b": [0]}, {"a": 1})


@pytest.mark.parametrize("count", [True, 2.0, "3", None])
def test_counts_must_be_ints(count):
    with pytest.raises(ActTypeError, match=r"m: number of channels: got .*, expected an integer of at least 1"):
        ChannelMask({}, {"m": count})


def test_counts_must_be_positive():
    with pytest.raises(ActValueError, match=r"m: number of channels: got 0, expected an integer of at least 1"):
        ChannelMask({}, {"m": 0})


def test_names_must_be_strings():
    with pytest.raises(ActTypeError, match=r"0: got int as a module name, expected a str"):
        ChannelMask({}, {0: 3})


def test_saves_and_loads(left, tmp_path):
    left.save(tmp_path / "mask")
    loaded = ChannelMask.load(tmp_path / "mask")
    assert loaded == left
    assert list(loaded) == list(left)


def test_the_file_is_pinned(left, tmp_path):
    left.save(tmp_path / "mask")
    assert (
        hashlib.sha256((tmp_path / "mask").read_bytes()).hexdigest()
        == "8d4e4687ea685f1144c2bdc634c1a4b34adc22ad1809131ebf6afb0fb76d5797"
    )
    tensors, metadata = tensorfile.read(tmp_path / "mask", "channel mask", 1)
    assert {name: index.tolist() for name, index in tensors.items()} == {"a.norm": [], "head": [1], "z.up": [0, 2, 5]}
    assert metadata == {"modules": [["z.up", 6], ["a.norm", 3], ["head", 4]]}


def save(path, tensors, modules):
    tensorfile.write(path, "channel mask", 1, tensors, {"modules": modules})
    return path


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([2, 1]), r"f: m: got unsorted or torch.int64 indices"),
        (torch.tensor([1], dtype=torch.int32), r"f: m: got unsorted or torch.int32 indices"),
        (torch.tensor([1.0]), r"f: m: got torch.float32, expected integer"),
        (torch.tensor([-1]), r"f: m: got channel -1"),
        (torch.tensor([4]), r"f: m: got channel 4, expected 0 to 3"),
        (torch.tensor([1, 1]), r"f: m: got channel 1 more than once"),
        (torch.tensor([[1]]), r"f: m: got channels of shape \[1, 1\]"),
    ],
)
def test_wrong_indices_in_a_file_are_refused(tmp_path, index, message):
    with pytest.raises(ActValueError, match=message):
        ChannelMask.load(save(tmp_path / "f", {"m": index}, [["m", 4]]))


@pytest.mark.parametrize("modules", [None, {"m": 4}, [["m"]], ["m4"], [[4, "m"]]])
def test_metadata_without_modules_is_refused(tmp_path, modules):
    with pytest.raises(ActValueError, match=r"f: metadata has no list of modules with their channels"):
        ChannelMask.load(save(tmp_path / "f", {"m": torch.tensor([1])}, modules))


@pytest.mark.parametrize("modules", [[], [["m", 4], ["n", 4]], [["n", 4]], [["m", 4], ["m", 4]]])
def test_tensors_and_metadata_must_agree(tmp_path, modules):
    with pytest.raises(ActValueError, match=r"f: got tensors for 1 modules, expected exactly the \d modules"):
        ChannelMask.load(save(tmp_path / "f", {"m": torch.tensor([1])}, modules))


@pytest.mark.parametrize("count", [4.0, True, 0, "4"])
def test_wrong_counts_in_a_file_are_refused(tmp_path, count):
    with pytest.raises(ActValueError, match=r"f: m: number of channels: got"):
        ChannelMask.load(save(tmp_path / "f", {"m": torch.tensor([0])}, [["m", count]]))


def test_a_file_of_scores_is_refused(tmp_path):
    tensorfile.write(tmp_path / "f", "channel scores", 1, {}, {})
    with pytest.raises(ActValueError, match=r"f: got a file of kind 'channel scores', expected 'channel mask'"):
        ChannelMask.load(tmp_path / "f")
