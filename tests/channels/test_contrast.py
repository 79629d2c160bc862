import copy
import hashlib
import pickle

import pytest
import torch

from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.disk import tensorfile
from act_peft.errors import ActTypeError, ActValueError

# 10 tokens of the ability, 4 of the data to keep. Means z: 4 1 3 1 over 2 .5 1 .1, a: 1 5 over 0 0
ABILITY = {"z": torch.tensor([40.0, 10.0, 30.0, 10.0]), "a": torch.tensor([10.0, 50.0])}
PINNED = "a2b6a25f6ab95e0eba8144d93e9fde3d0b212c82d85f785c85a89e63f597246a"
KEEP = {"z": torch.tensor([8.0, 2.0, 4.0, 0.4]), "a": torch.zeros(2)}


def contrast_of(ability, keep, tokens=(10, 4), **options):
    kept = ChannelScores(keep, tokens[1], **options)
    return ChannelScores(ability, tokens[0], kind="contrast", keep=kept, **options)


@pytest.fixture
def scores():
    return contrast_of(ABILITY, KEEP)


def test_the_quotient_with_its_floor(scores):
    assert scores.kind is ScoreKind.CONTRAST
    assert scores.num_tokens == 10
    assert scores.keep == ChannelScores(KEEP, 4)
    # the mean of z is .9, so its last divisor is .1 as it stands, not below .09
    torch.testing.assert_close(scores["z"], torch.tensor([2.0, 2.0, 3.0, 10.0], dtype=torch.float64))
    # a has no difference at all: a tenth of the mean over all modules, 3.6 / 6
    torch.testing.assert_close(scores["a"], torch.tensor([1 / 0.06, 5 / 0.06], dtype=torch.float64))
    assert repr(scores) == "ChannelScores(6 channels in 2 modules, 10 tokens, by contrast)"
    assert [len(index) for index in scores.top(0.5).values()] == [1, 2]


def test_a_divisor_below_the_floor():
    scores = contrast_of({"m": torch.tensor([6.0, 6.0, 0.0])}, {"m": torch.tensor([0.0, 3.0, 0.0])}, (1, 1))
    assert scores["m"].tolist() == pytest.approx([60, 2, 0])  # the floor is a tenth of 1


def test_only_comparable_channels_count_in_the_floor():
    ability, keep = {"m": torch.tensor([6.0, 6.0, 0.0])}, {"m": torch.tensor([0.0, 4.0, 0.0])}
    scores = contrast_of(ability, keep, (1, 1), num_comparable={"m": 2})
    assert scores["m"].tolist() == pytest.approx([30, 1.5, 0])  # a tenth of 2


def test_models_that_are_alike_have_no_contrast():
    nothing = {"m": torch.zeros(3)}
    assert contrast_of(nothing, nothing)["m"].tolist() == [0, 0, 0]
    assert contrast_of(nothing, {"m": torch.ones(3)})["m"].tolist() == [0, 0, 0]


def test_both_sides_are_pooled(scores):
    other = contrast_of({name: v * 3 for name, v in ABILITY.items()}, {n: v + 1 for n, v in KEEP.items()}, (5, 16))
    both = scores + other
    expected = contrast_of(
        {name: v * 4 for name, v in ABILITY.items()}, {name: 2 * v + 1 for name, v in KEEP.items()}, (15, 20)
    )
    assert both.num_tokens == 15
    assert both.keep.num_tokens == 20
    for name in both:
        torch.testing.assert_close(both[name], expected[name])
    with pytest.raises(ActValueError, match=r"got scores by contrast on the left and by activation on the right"):
        scores + scores.keep


def test_equality_copies_and_pickles(scores):
    assert scores == contrast_of(ABILITY, KEEP)
    assert scores != contrast_of(ABILITY, KEEP, (10, 5))
    assert scores != contrast_of(ABILITY, ABILITY)
    assert scores != ChannelScores(ABILITY, 10)
    assert copy.deepcopy(scores) == pickle.loads(pickle.dumps(scores)) == scores


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ActValueError, r"keep: got None for scores by contrast, expected scores by activation on the data to"),
        ({"keep": KEEP}, ActTypeError, r"keep: got dict, expected ChannelScores"),
        (
            {"kind": "activation", "keep": ChannelScores(KEEP, 1)},
            ActValueError,
            r"keep: got scores for scores by activation, expected None",
        ),
        (
            {"keep": ChannelScores(KEEP, 1, kind="attribution")},
            ActValueError,
            r"keep: got scores by attribution, expected scores by activation",
        ),
        ({"keep": ChannelScores({"z": KEEP["z"]}, 1)}, ActValueError, r"keep: got scores of other channels, expected"),
        (
            {"keep": ChannelScores({**KEEP, "z": torch.tensor([1.0, 0, 0, 0])}, 1, num_comparable={"z": 1})},
            ActValueError,
            r"keep: got scores of other channels, expected",
        ),
        (
            {"keep": ChannelScores({name: values * 0 for name, values in KEEP.items()}, 1)},
            ActValueError,
            r"keep: got 0 for every channel, expected differences to divide by",
        ),
    ],
)
def test_wrong_data_to_keep_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ChannelScores(ABILITY, 10, **{"kind": "contrast", **options})


class TestThirdVersion:
    def test_saves_and_loads(self, scores, tmp_path):
        for made in (scores, contrast_of({"m": torch.tensor([1.0, 0])}, {"m": torch.ones(2) * torch.tensor([1, 0])})):
            made.save(tmp_path / "f")
            loaded = ChannelScores.load(tmp_path / "f")
            assert loaded == made
            assert loaded.keep == made.keep
            assert list(loaded) == list(made)
        with pytest.raises(ActValueError, match=r"got version 3 of kind 'channel scores', expected at most 2"):
            tensorfile.read(tmp_path / "f", "channel scores", 2)

    def test_the_file_is_pinned(self, scores, tmp_path):
        scores.save(tmp_path / "f")
        tensors, metadata = tensorfile.read(tmp_path / "f", "channel scores", 3)
        assert metadata == {
            "modules": ["z", "a"],
            "num_tokens": 10,
            "score": "contrast",
            "num_comparable": {},
            "num_keep_tokens": 4,
        }
        assert tensors["z"].dtype == torch.float64
        assert torch.equal(tensors["z"], torch.stack([ABILITY["z"], KEEP["z"]]).double())
        assert hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest() == PINNED

    @pytest.mark.parametrize(
        ("values", "changes", "message"),
        [
            (torch.ones(2), {}, r"f: m: got sums of shape \[2\], expected \[2, C\] \(save them again\)"),
            (torch.ones(3, 2), {}, r"f: m: got sums of shape \[3, 2\], expected \[2, C\]"),
            (torch.ones(2, 2), {"num_keep_tokens": None}, r"f: num_tokens: got None, expected an integer of at lea"),
            (torch.ones(2, 2), {"score": "activation"}, r"f: m: got sums of shape \[2, 2\], expected \[C\]"),
            (torch.tensor([[1.0], [0.0]]), {}, r"f: keep: got 0 for every channel"),
        ],
    )
    def test_wrong_content_is_refused(self, values, changes, message, tmp_path):
        metadata = {"modules": ["m"], "num_tokens": 1, "score": "contrast", "num_comparable": {}, "num_keep_tokens": 1}
        tensorfile.write(tmp_path / "f", "channel scores", 3, {"m": values}, {**metadata, **changes})
        with pytest.raises(ActValueError, match=message):
            ChannelScores.load(tmp_path / "f")
