import copy
import dataclasses
import hashlib
import pickle
import struct

import pytest
import torch

from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.channels.selection import Normalization, Scope
from act_peft.disk import tensorfile
from act_peft.errors import ActTypeError, ActValueError

# 10 tokens; scores z: 4 1 3 1, a: 1 5, m: 0.1 0.2 0.3 0.4
SUMS = {
    "z": torch.tensor([40.0, 10.0, 30.0, 10.0]),
    "a": torch.tensor([10.0, 50.0]),
    "m": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
}


@pytest.fixture
def scores():
    return ChannelScores(SUMS, 10)


def chosen(mask):
    return {name: index.tolist() for name, index in mask.items()}


def test_is_a_mapping_of_means(scores):
    assert list(scores) == ["z", "a", "m"]
    assert len(scores) == 3
    assert "a" in scores
    assert "b" not in scores
    assert scores.num_tokens == 10
    assert scores["z"].dtype == torch.float64
    assert torch.equal(scores["z"], torch.tensor([4.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    assert dict(scores.num_channels) == {"z": 4, "a": 2, "m": 4}
    assert repr(scores) == "ChannelScores(10 channels in 3 modules, 10 tokens)"


def test_it_cannot_be_changed(scores):
    given = torch.ones(2)
    kept = ChannelScores({"m": given}, 1)
    given.zero_()
    kept["m"].zero_()
    assert kept["m"].tolist() == [1, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.num_tokens = 3
    with pytest.raises(TypeError):
        scores.num_channels["z"] = 3


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, {"z": [], "a": [], "m": []}),
        (1, {"z": [], "a": [1], "m": []}),
        (2, {"z": [0], "a": [1], "m": []}),
        (3, {"z": [0, 2], "a": [1], "m": []}),
        (4, {"z": [0, 1, 2], "a": [1], "m": []}),  # of three equal scores, the first module's lower channel
        (5, {"z": [0, 1, 2, 3], "a": [1], "m": []}),
        (6, {"z": [0, 1, 2, 3], "a": [0, 1], "m": []}),
        (9, {"z": [0, 1, 2, 3], "a": [0, 1], "m": [1, 2, 3]}),
        (10, {"z": [0, 1, 2, 3], "a": [0, 1], "m": [0, 1, 2, 3]}),
    ],
)
def test_top_ranks_all_modules_together(scores, k, expected):
    mask = scores.top(k / 10)
    assert chosen(mask) == expected
    assert dict(mask.num_channels) == {"z": 4, "a": 2, "m": 4}
    assert mask.num_selected == k


@pytest.mark.parametrize(
    ("density", "k"),
    [
        (0.04, 0),
        (0.05, 0),
        (0.06, 1),
        (0.15, 2),
        (0.25, 2),
        (0.35, 4),
        (0.94, 9),
        (0.95, 10),
        (1, 10),
        (True * 0.5, 5),
    ],
)
def test_the_number_of_channels_is_rounded_half_to_even(scores, density, k):
    assert scores.top(density).num_selected == k


def test_top_per_module(scores):
    assert chosen(scores.top(0.5, scope="module")) == {"z": [0, 2], "a": [1], "m": [2, 3]}
    assert chosen(scores.top(0.75, scope=Scope.MODULE)) == {"z": [0, 1, 2], "a": [0, 1], "m": [1, 2, 3]}
    assert scores.top(0, scope="module").num_selected == 0
    assert scores.top(1, scope="module").num_selected == 10


def test_rms_normalization(scores):
    # z / 2.598, a / 3.606, m / 0.274: z 1.54 .38 1.15 .38, a .28 1.39, m .37 .73 1.10 1.46
    expected = {"z": [0, 2], "a": [1], "m": [3]}
    assert chosen(scores.top(0.4, normalize="rms")) == expected
    assert chosen(scores.top(0.4, normalize=Normalization.RMS)) == expected
    assert chosen(scores.top(0.4, normalize="none")) == {"z": [0, 1, 2], "a": [1], "m": []}
    assert scores.top(0.5, scope="module", normalize="rms") == scores.top(0.5, scope="module")


def test_rms_normalization_ignores_the_scale_of_a_module(scores):
    scaled = ChannelScores({**SUMS, "z": SUMS["z"].double() * 2.0**900, "m": SUMS["m"] * 2.0**-600}, 10)
    for k in range(11):
        assert scaled.top(k / 10, normalize="rms") == scores.top(k / 10, normalize="rms")


def test_modules_without_any_difference():
    silent = ChannelScores({"a": torch.zeros(2), "b": torch.tensor([0.0, 1.0])}, 1)
    assert chosen(silent.top(0.5, normalize="rms")) == {"a": [0], "b": [1]}
    assert chosen(silent.top(0.5)) == {"a": [0], "b": [1]}


def test_top_against_a_sort_in_python():
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.randint(6, (30,), generator=generator).double() for name in "cab"}
    pairs = [(-float(v), m, i) for m, name in enumerate(sums) for i, v in enumerate(sums[name])]
    for k in range(0, 91, 7):
        expected = {name: [] for name in sums}
        for _, m, i in sorted(pairs)[:k]:
            expected[list(sums)[m]].append(i)
        assert chosen(ChannelScores(sums, 3).top(k / 90)) == {name: sorted(v) for name, v in expected.items()}


@pytest.mark.parametrize("density", [-0.1, 1.1, 5, float("nan"), float("inf")])
def test_density_out_of_range(scores, density):
    with pytest.raises(ActValueError, match=r"density: got .*, expected a number from 0 to 1 \(5% is 0.05\)"):
        scores.top(density)


@pytest.mark.parametrize("density", ["0.5", True, None, [0.5]])
def test_density_of_another_type(scores, density):
    with pytest.raises(ActTypeError, match=r"density: got .*, expected a number from 0 to 1"):
        scores.top(density)


def test_unknown_choices(scores):
    with pytest.raises(ActValueError, match=r"scope: got 'layer', expected one of 'global', 'module'"):
        scores.top(0.5, scope="layer")
    with pytest.raises(ActValueError, match=r"normalize: got None, expected one of 'none', 'rms'"):
        scores.top(0.5, normalize=None)


def test_addition_pools_sums_and_counts(scores):
    other = ChannelScores({name: values * 0 + 2 for name, values in SUMS.items()}, 30)
    pooled = scores + other
    assert pooled.num_tokens == 40
    assert torch.equal(pooled["a"], torch.tensor([12.0 / 40, 52.0 / 40], dtype=torch.float64))
    assert pooled == other + scores
    assert list(pooled) == list(scores)


def test_addition_of_other_pairs_is_refused(scores):
    with pytest.raises(
        ActValueError, match=r"a: got 2 channels on the left and 1 channels on the right.*\(1 of 3 mod"
    ):
        scores + ChannelScores({**SUMS, "a": torch.ones(1)}, 1)
    with pytest.raises(ActValueError, match=r"b: got no such module on the left and 1 channels on the right"):
        scores + ChannelScores({**SUMS, "b": torch.ones(1)}, 1)
    with pytest.raises(ActValueError, match=r"z: got 4 channels on the left and no such module on the right"):
        scores + ChannelScores({"a": torch.ones(2)}, 1)
    assert scores.__add__(3) is NotImplemented


def test_equality_copies_and_pickles(scores):
    assert scores == ChannelScores(dict(reversed(SUMS.items())), 10)
    assert scores != ChannelScores(SUMS, 11)
    assert scores != ChannelScores({**SUMS, "a": torch.ones(2)}, 10)
    assert scores != ChannelScores({"a": SUMS["a"]}, 10)
    assert scores != SUMS
    for other in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert other == scores
        assert list(other) == list(scores)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.tensor([1.0, float("nan")]), ActValueError, r"m: got nan for channel 1, expected finite.*\(1 of 2"),
        (torch.tensor([float("inf"), -1.0]), ActValueError, r"m: got inf for channel 0, expected finite.*\(2 of 2"),
        (torch.tensor([-1.0]), ActValueError, r"m: got -1.0 for channel 0"),
        (torch.tensor([1]), ActTypeError, r"m: got torch.int64, expected a floating point tensor \[C\]"),
        ([1.0], ActTypeError, r"m: got list, expected a floating point tensor \[C\]"),
        (torch.ones(2, 2), ActTypeError, r"m: got sums of shape \[2, 2\], expected \[C\]"),
        (torch.ones(0), ActTypeError, r"m: got sums of shape \[0\], expected \[C\]"),
    ],
)
def test_wrong_sums_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        ChannelScores({"m": values}, 1)


def test_wrong_arguments_are_refused():
    with pytest.raises(ActTypeError, match=r"num_tokens: got 1.0, expected an integer of at least 1"):
        ChannelScores(SUMS, 1.0)
    with pytest.raises(ActTypeError, match=r"num_tokens: got True, expected an integer of at least 1"):
        ChannelScores(SUMS, True)
    with pytest.raises(ActValueError, match=r"num_tokens: got 0, expected an integer of at least 1"):
        ChannelScores(SUMS, 0)
    with pytest.raises(ActValueError, match=r"sums: got no module"):
        ChannelScores({}, 1)
    with pytest.raises(ActTypeError, match=r"0: got int as a module name"):
        ChannelScores({0: torch.ones(1)}, 1)


def test_saves_and_loads(scores, tmp_path):
    scores.save(tmp_path / "scores")
    loaded = ChannelScores.load(tmp_path / "scores")
    assert loaded == scores
    assert list(loaded) == list(scores)


def test_the_file_is_pinned(scores, tmp_path):
    scores.save(tmp_path / "f")
    assert (
        hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
        == "2f398dc3c89a8327fc1b2e9361288fa34e3404d6b5bd6cd6927f70f3d7f44e43"
    )
    tensors, metadata = tensorfile.read(tmp_path / "f", "channel scores", 1)
    assert metadata == {"modules": ["z", "a", "m"], "num_tokens": 10}
    assert {name: (v.dtype, v.tolist()) for name, v in tensors.items()} == {
        name: (torch.float64, v.tolist()) for name, v in SUMS.items()
    }


def test_a_file_of_version_0_1_loads(tmp_path):
    """Byte for byte what `save` of that version wrote."""
    header = (
        rb'{"__metadata__":{"act_peft":"{\"kind\":\"channel scores\",\"metadata\":{\"modules\":[\"m\"],'
        rb'\"num_tokens\":2},\"version\":1}"},"m":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}   '
    )
    data = struct.pack("<2d", 6, 1)
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + data)
    scores = ChannelScores.load(tmp_path / "f")
    assert scores == ChannelScores({"m": torch.tensor([6.0, 1.0])}, 2)
    assert scores["m"].tolist() == [3, 0.5]
    scores.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("modules", [None, "m", [], ["m", "n"], ["m", "m"], [["m"]]])
def test_tensors_and_metadata_must_agree(tmp_path, modules):
    tensorfile.write(tmp_path / "f", "channel scores", 1, {"m": torch.ones(1)}, {"modules": modules, "num_tokens": 1})
    with pytest.raises(ActValueError, match=r"f: got tensors for 1 modules, expected exactly those"):
        ChannelScores.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("values", "num_tokens", "message"),
    [
        (torch.tensor([float("nan")]), 1, r"f: m: got nan for channel 0"),
        (torch.tensor([1]), 1, r"f: m: got torch.int64"),
        (torch.ones(1), 0, r"f: num_tokens: got 0"),
        (torch.ones(1), 1.5, r"f: num_tokens: got 1.5"),
        (torch.ones(1), None, r"f: num_tokens: got None"),
    ],
)
def test_wrong_content_is_refused(tmp_path, values, num_tokens, message):
    tensorfile.write(tmp_path / "f", "channel scores", 1, {"m": values}, {"modules": ["m"], "num_tokens": num_tokens})
    with pytest.raises(ActValueError, match=message):
        ChannelScores.load(tmp_path / "f")


class TestKinds:
    def test_weights_have_no_tokens(self):
        scores = ChannelScores({"m": torch.tensor([2.0, 1.0])}, 0, kind="weight")
        assert scores.kind is ScoreKind.WEIGHT
        assert scores.num_tokens == 0
        assert scores["m"].tolist() == [2, 1]
        assert repr(scores) == "ChannelScores(2 channels in 1 modules, 0 tokens, by weight)"
        with pytest.raises(ActValueError, match=r"num_tokens: got 3, expected 0 \(scores by weight are no mean\)"):
            ChannelScores(SUMS, 3, kind="weight")

    def test_attributions_may_be_negative(self):
        scores = ChannelScores({"m": torch.tensor([-4.0, 6.0, 0.0]), "n": torch.tensor([-2.0])}, 2, kind="attribution")
        assert scores["m"].tolist() == [-2, 3, 0]
        assert chosen(scores.top(0.75)) == {"m": [1, 2], "n": [0]}
        assert chosen(scores.top(0.75, normalize="rms")) == {"m": [0, 1, 2], "n": []}  # -0.96 above -1
        for values in (torch.tensor([-1.0]), torch.tensor([float("nan")])):
            with pytest.raises(ActValueError, match=r"m: got .* for channel 0, expected finite sums of absolute"):
                ChannelScores({"m": values}, 1)
        with pytest.raises(ActValueError, match=r"m: got nan for channel 0, expected finite sums \(1 of 1"):
            ChannelScores({"m": torch.tensor([float("nan")])}, 1, kind="attribution")

    def test_unknown_kind(self):
        with pytest.raises(ActValueError, match=r"kind: got 'loss', expected one of 'activation', 'weight'"):
            ChannelScores(SUMS, 1, kind="loss")

    def test_only_the_same_kind_is_pooled(self, scores):
        attributions = ChannelScores(SUMS, 10, kind="attribution")
        assert attributions != scores
        assert (attributions + attributions).kind is ScoreKind.ATTRIBUTION
        with pytest.raises(ActValueError, match=r"got scores by activation on the left and by attribution on the rig"):
            scores + attributions
        weights = ChannelScores(SUMS, 0, kind="weight")
        with pytest.raises(
            ActValueError, match=r"got scores by weight on the left and by weight .* are no means over tokens"
        ):
            weights + weights


class TestComparable:
    @pytest.fixture
    def partial(self):
        """Scores whose module z has four channels, of which two are comparable."""
        return ChannelScores({**SUMS, "z": torch.tensor([40.0, 0, 0, 0])}, 10, num_comparable={"z": 2, "a": 2})

    def test_what_is_not_comparable_is_never_selected(self, partial):
        assert dict(partial.num_comparable) == {"z": 2, "a": 2, "m": 4}
        for options in ({}, {"scope": "module"}, {"normalize": "rms"}):
            mask = partial.top(1.0, **options)
            assert chosen(mask) == {"z": [0, 1], "a": [0, 1], "m": [0, 1, 2, 3]}
            assert dict(mask.num_channels) == {"z": 4, "a": 2, "m": 4}
        assert partial.top(0.5).num_selected == 4  # of 8
        assert partial.top(0.5, scope="module")["z"].tolist() == [0]

    def test_the_mean_square_is_that_of_the_comparable(self):
        values = torch.tensor([3.0, 1.0])
        short = ChannelScores({"z": values, "m": torch.tensor([3.0, 2.0])}, 1)
        padded = ChannelScores(
            {"z": torch.cat((values, torch.zeros(90))), "m": torch.tensor([3.0, 2.0])}, 1, num_comparable={"z": 2}
        )
        for k in range(5):
            assert chosen(padded.top(k / 4, normalize="rms")) == chosen(short.top(k / 4, normalize="rms"))

    def test_pooling_and_equality(self, partial, scores):
        assert partial != ChannelScores({name: partial[name] * 10 for name in partial}, 10)
        assert dict((partial + partial).num_comparable) == dict(partial.num_comparable)
        with pytest.raises(ActValueError, match=r"z: got 2 channels on the left and 4 channels on the right"):
            partial + scores

    @pytest.mark.parametrize(
        ("counts", "error", "message"),
        [
            ({"q": 1}, ActValueError, r"num_comparable: q is not a module of these scores"),
            ({"z": 1.0}, ActTypeError, r"z: number of comparable channels: got 1.0, expected an integer from"),
            ({"z": 0}, ActValueError, r"z: number of comparable channels: got 0, expected an integer from 1 to 4"),
            ({"z": 5}, ActValueError, r"z: number of comparable channels: got 5, expected an integer from 1 to 4"),
            ({"z": 3}, ActValueError, r"z: got a score other than 0 for a channel after the 3 comparable ones"),
        ],
    )
    def test_wrong_counts(self, counts, error, message):
        with pytest.raises(error, match=message):
            ChannelScores(SUMS, 10, num_comparable=counts)


class TestSecondVersion:
    @pytest.fixture
    def scores(self):
        return ChannelScores({"m": torch.tensor([-1.0, 2.0, 0.0])}, 5, kind="attribution", num_comparable={"m": 2})

    def test_saves_and_loads(self, scores, tmp_path):
        scores.save(tmp_path / "f")
        assert ChannelScores.load(tmp_path / "f") == scores
        with pytest.raises(ActValueError, match=r"got version 2 of kind 'channel scores', expected at most 1"):
            tensorfile.read(tmp_path / "f", "channel scores", 1)

    def test_the_file_is_pinned(self, scores, tmp_path):
        scores.save(tmp_path / "f")
        _, metadata = tensorfile.read(tmp_path / "f", "channel scores", 2)
        assert metadata == {
            "modules": ["m"],
            "num_tokens": 5,
            "score": "attribution",
            "num_comparable": {"m": 2},
        }
        assert (
            hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
            == "08dbf68596978b187ba263d0f3ad5f22a07aa26d4752e4a26c25133a832d7943"
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_comparable": 3}, r"f: num_comparable: got 3, expected an object of counts"),
            ({"num_comparable": {"m": "1"}}, r"f: m: number of comparable channels: got '1'"),
            ({"score": "loss"}, r"f: kind: got 'loss', expected one of"),
            ({"score": "activation"}, r"f: m: got -1.0 for channel 0"),
        ],
    )
    def test_wrong_content_is_refused(self, changes, message, tmp_path):
        metadata = {"modules": ["m"], "num_tokens": 1, "score": "attribution", "num_comparable": {}}
        tensorfile.write(tmp_path / "f", "channel scores", 2, {"m": torch.tensor([-1.0])}, {**metadata, **changes})
        with pytest.raises(ActValueError, match=message):
            ChannelScores.load(tmp_path / "f")
