from __future__ import annotations

import itertools
import json
import random

import pytest

from act_peft import ActValueError, ChannelMask
from act_peft.channels.selection import Normalization, Scope
from act_peft.sweeps.heldout import SkillResult
from act_peft.sweeps.result import Measurement, SweepResult, SweepRow, pareto_front, recommend


def row(density, scale, ability, *keep, loss=1.0):
    results = {f"skill {number}": SkillResult(0.5, value) for number, value in enumerate(keep)}
    return SweepRow(SkillResult(loss, ability), results, density, scale, round(100 * density))


def result_of(rows, base, *, max_drop=0.05, donor=None):
    masks = {r.density: ChannelMask({"m": range(r.num_channels)}, {"m": 100}) for r in rows}
    return SweepResult(tuple(rows), base, donor, max_drop, Scope.GLOBAL, Normalization.NONE, masks)


BASE = row(0.0, 0.0, 0.5, 0.9, 0.8)
ROWS = [
    row(0.1, 0.4, 0.6, 0.9, 0.76),
    row(0.1, 0.8, 0.7, 0.9, 0.74),  # the second skill loses 6 points
    row(0.2, 0.4, 0.65, 0.85, 0.75),
    row(0.2, 0.8, 0.65, 0.85, 0.75),
    row(0.4, 0.4, 0.62, 0.8, 0.8),  # the first one loses 10
]


def random_rows(seed, skills):
    generator = random.Random(seed)
    grid = itertools.product((0.1, 0.2, 0.3), (0.3, 0.6, 0.9))
    share = lambda: generator.randint(0, 4) / 4  # few values, so that there are ties
    return [row(0.0, 0.0, share(), *(share() for _ in range(skills)))] + [
        row(density, scale, share(), *(share() for _ in range(skills))) for density, scale in grid
    ]


@pytest.mark.parametrize("skills", [1, 2])
@pytest.mark.parametrize("seed", range(50))
class TestBruteForce:
    def test_pareto_front(self, seed, skills):
        rows = random_rows(seed, skills)
        points = [(r.ability.accuracy, sum(k.accuracy for k in r.keep.values()) / skills) for r in rows]
        expected = []
        for i, (ability, keep) in enumerate(points):
            beaten = False
            for j, (other_ability, other_keep) in enumerate(points):
                better = other_ability > ability or other_keep > keep
                beaten |= other_ability >= ability and other_keep >= keep and (better or j < i)
            if not beaten:
                expected.append(rows[i])
        random.Random(seed).shuffle(rows)
        front = pareto_front(rows)
        assert sorted(front, key=lambda r: (r.density, r.transfer_scale)) == expected
        assert list(front) == sorted(front, key=lambda r: r.ability.accuracy)

    @pytest.mark.parametrize("max_drop", [0, 0.25, 1])
    def test_recommendation(self, seed, skills, max_drop):
        base, *rows = random_rows(seed, skills)
        best = None
        for candidate in rows:  # in the order of density, then scale
            kept = [candidate.keep[name].accuracy >= base.keep[name].accuracy - max_drop for name in base.keep]
            better = candidate.ability.accuracy > (base if best is None else best).ability.accuracy
            if all(kept) and better:
                best = candidate
        random.Random(seed).shuffle(rows)
        assert recommend(rows, base, max_drop=max_drop) == best


def test_a_drop_that_is_exactly_allowed_is_allowed():
    assert recommend([row(0.1, 1, 0.9, 0.85)], row(0, 0, 0.5, 0.9), max_drop=0.05) is not None
    assert recommend([row(0.1, 1, 0.9, 0.849)], row(0, 0, 0.5, 0.9), max_drop=0.05) is None


def test_the_recommendation_can_be_used():
    result = result_of(ROWS, BASE)
    assert result.recommended is ROWS[2]
    assert (result.density, result.transfer_scale) == (0.2, 0.4)
    assert result.mask == ChannelMask({"m": range(20)}, {"m": 100})
    assert repr(result) == "SweepResult(5 settings, recommended: density 0.2, scale 0.4)"


@pytest.mark.parametrize("name", ["density", "transfer_scale", "mask"])
def test_no_recommendation(name):
    result = result_of([row(0.1, 0.4, 0.5, 0.9, 0.8)], BASE)
    assert result.recommended is None
    assert "recommended: none" in repr(result)
    assert "recommended: none of 1 settings (the highest" in str(result)
    assert result.to_dict()["recommended"] is None
    with pytest.raises(
        ActValueError, match=r"recommendation: got none of 1 settings, expected the highest .* 5 points"
    ):
        getattr(result, name)


def test_the_table():
    donor = Measurement(SkillResult(0.1, 1.0), BASE.keep)
    lines = str(result_of(ROWS, BASE, donor=donor)).splitlines()
    assert lines[0] == "token accuracy and loss on held-out data, 5 settings, scope global"
    assert lines[2:6] == [
        "density  scale  channels  ability   loss  skill 0   loss  skill 1   loss",
        "base                        0.500  1.000    0.900  0.500    0.800  0.500  front",
        "0.1        0.4        10    0.600  1.000    0.900  0.500    0.760  0.500  front",
        "0.1        0.8        10    0.700  1.000    0.900  0.500    0.740  0.500  front",
    ]
    assert lines[6].endswith("  recommended")
    assert lines[9].split() == ["donor", "1.000", "0.100", "0.900", "0.500", "0.800", "0.500"]
    assert lines[-1].startswith("recommended: density 0.2, scale 0.4 (the highest token accuracy on the ability among")


def test_plain_values_are_json():
    rows = [*ROWS, row(0.4, 0.8, 0.0, 0.0, 0.0, loss=float("nan"))]
    plain = json.loads(json.dumps(result_of(rows, BASE).to_dict(), allow_nan=False))
    assert plain["recommended"] == {
        "method": "channels",
        "settings": {},
        "density": 0.2,
        "transfer_scale": 0.4,
        "num_channels": 20,
    }
    assert plain["donor"] is None
    assert plain["base"]["keep"]["skill 1"] == {"loss": 0.5, "accuracy": 0.8}
    assert [entry["recommended"] for entry in plain["rows"]] == [False, False, True, False, False, False]
    assert [entry["on_front"] for entry in plain["rows"]] == [True, True, False, False, False, False]
    assert plain["rows"][-1]["ability"]["loss"] is None
    donor = Measurement(SkillResult(0.1, 1.0), BASE.keep)
    assert result_of(ROWS, BASE, donor=donor).to_dict()["donor"]["ability"] == {"loss": 0.1, "accuracy": 1.0}
