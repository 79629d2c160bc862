import warnings

import pytest
import torch

from act_peft.channels.names import last_part
from act_peft.channels.scores import ChannelScores
from act_peft.errors import ActTypeError, ActValueError, ActWarning

KINDS = ("q_proj", "up_proj", "down_proj", "norm")


def chosen(mask):
    return {name: index.tolist() for name, index in mask.items()}


def scores_of(loud, *, layers=2, channels=10, factor=100.0, kinds=KINDS):
    """Random scores of some kinds of modules, in which one kind is much louder than the others."""
    generator = torch.Generator().manual_seed(0)
    sums = {
        f"layers.{layer}.{kind}": torch.rand(channels, generator=generator) * (factor if kind == loud else 1)
        for layer in range(layers)
        for kind in kinds
    }
    return ChannelScores(sums, 1)


class TestMaxChannels:
    @pytest.fixture
    def scores(self):
        return ChannelScores(
            {"z": torch.tensor([9.0, 8.0, 9.0, 1.0]), "a": torch.tensor([7.0, 3.0]), "m": torch.tensor([2.0, 6.0])}, 1
        )

    @pytest.mark.parametrize(
        ("density", "most", "expected"),
        [
            (3 / 8, None, {"z": [0, 1, 2], "a": [], "m": []}),
            (3 / 8, 4, {"z": [0, 1, 2], "a": [], "m": []}),
            (3 / 8, 2, {"z": [0, 2], "a": [0], "m": []}),  # the free place goes to the next best of another module
            (3 / 8, 1, {"z": [0], "a": [0], "m": [1]}),  # of equal scores the lower channel stays
            (5 / 8, 2, {"z": [0, 2], "a": [0, 1], "m": [1]}),
            (1, 1, {"z": [0], "a": [0], "m": [1]}),  # fewer than the density asks for
            (0, 1, {"z": [], "a": [], "m": []}),
        ],
    )
    def test_free_places_go_to_other_modules(self, scores, density, most, expected):
        assert chosen(scores.top(density, max_channels=most)) == expected

    def test_a_share_of_every_module_stays_a_share(self, scores):
        assert chosen(scores.top(0.5, scope="module", max_channels=1)) == {"z": [0], "a": [0], "m": [1]}
        assert scores.top(0.5, scope="module", max_channels=2) == scores.top(0.5, scope="module")

    def test_it_holds_after_rescaling(self, scores):
        assert chosen(scores.top(1.0, normalize="rms", max_channels=1)) == {"z": [0], "a": [0], "m": [1]}

    def test_against_a_loop(self):
        generator = torch.Generator().manual_seed(0)
        sums = {name: torch.randint(6, (30,), generator=generator).double() for name in "cab"}
        pairs = sorted((-float(v), m, i) for m, name in enumerate(sums) for i, v in enumerate(sums[name]))
        for k in range(0, 91, 7):
            for most in (1, 4, 11, 30):
                expected = {name: [] for name in sums}
                for _, m, i in pairs:
                    place = expected[list(sums)[m]]
                    if len(place) < most and sum(map(len, expected.values())) < k:
                        place.append(i)
                got = chosen(ChannelScores(sums, 3).top(k / 90, max_channels=most))
                assert got == {name: sorted(index) for name, index in expected.items()}

    def test_what_is_not_comparable_is_not_counted(self):
        scores = ChannelScores({"z": torch.tensor([5.0, 4.0, 0, 0])}, 1, num_comparable={"z": 2})
        assert chosen(scores.top(1.0, max_channels=3)) == {"z": [0, 1]}

    @pytest.mark.parametrize("most", [0, -3])
    def test_out_of_range(self, scores, most):
        with pytest.raises(ActValueError, match=rf"max_channels: got {most}, expected an integer of at least 1"):
            scores.top(0.5, max_channels=most)

    @pytest.mark.parametrize("most", [2.0, "2", True])
    def test_of_another_type(self, scores, most):
        with pytest.raises(ActTypeError, match=r"max_channels: got .*, expected an integer of at least 1"):
            scores.top(0.5, max_channels=most)


class TestOneKindOfModule:
    def test_it_is_named_with_its_share_and_a_way_out(self):
        scores = scores_of("down_proj")  # 80 channels, 20 of each kind
        with pytest.warns(ActWarning) as warned:
            mask = scores.top(0.25)
        assert mask.num_selected == 20
        share = sum(len(index) for name, index in mask.items() if name.endswith("down_proj")) / 20
        (message,) = (str(warning.message) for warning in warned)
        assert message.startswith(f"top: {share:.0%} of the selected channels belong to 'down_proj', which has 25% of")
        assert "scope='module'" in message
        assert "exclude_modules=['down_proj']" in message
        assert warned[0].filename == __file__

    @pytest.mark.parametrize(
        ("scores", "density", "options"),
        [
            (scores_of("down_proj"), 0.25, {"scope": "module"}),
            (scores_of("down_proj"), 0.25, {"max_channels": 5}),
            (scores_of("down_proj"), 0.25, {"normalize": "rms"}),
            (scores_of("down_proj"), 1.0, {}),
            (scores_of("down_proj"), 0.11, {}),  # nine channels say little
            (scores_of(None), 0.25, {}),
            (scores_of("q_proj", kinds=["q_proj"]), 0.5, {}),  # there is no other kind
        ],
    )
    def test_no_warning(self, scores, density, options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores.top(density, **options)

    def test_candidates_that_are_mostly_of_one_kind(self):
        """With 60% of the candidates, no share of the mask would be twice as much."""
        sums = {"0.up_proj": torch.rand(60) + 9, "0.q_proj": torch.rand(20), "1.k_proj": torch.rand(20)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ChannelScores(sums, 1).top(0.5).num_selected == 50
        sums["0.up_proj"] = sums["0.up_proj"][:30]  # 30 of 70
        with pytest.warns(ActWarning, match=r"top: 100% of the selected channels belong to 'up_proj', which has 43%"):
            ChannelScores(sums, 1).top(0.4)

    def test_the_share_is_that_of_the_comparable(self):
        sums = {"head": torch.cat((torch.rand(20) + 9, torch.zeros(80))), "q_proj": torch.rand(40)}
        scores = ChannelScores(sums, 1, num_comparable={"head": 20})
        with pytest.warns(ActWarning, match=r"100% of the selected channels belong to 'head', which has 33% of"):
            scores.top(0.3)


def test_the_kind_of_a_module_is_the_last_part_of_its_name():
    assert last_part("model.layers.3.mlp.down_proj") == "down_proj"
    assert last_part("lm_head") == "lm_head"
