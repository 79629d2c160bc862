"""The comparison of methods runs through, chooses by validation problems alone, and remembers what it ran."""

from __future__ import annotations

import importlib
import itertools
import json
import shlex

import pytest
import torch

from act_peft.demo.family import BASE, DONOR
from act_peft.demo.words import Language

# Two steps on a handful of problems: what is tested is that every method runs, not how good it is.
BRIEF = shlex.split(
    "--seeds 0 --examples 8 --validation 4 --test 4 --steps 2 --row-steps 1 --batch-size 6 --settings 1"
)


@pytest.fixture(scope="module")
def compare_recovery():
    return importlib.import_module("tests.benchmarks.compare_recovery")


@pytest.fixture
def folder(tmp_path):
    family = tmp_path / "family_seed0"
    family.mkdir()
    (family / "base").symlink_to(BASE)
    (family / "donor").symlink_to(DONOR)
    return tmp_path


@pytest.fixture
def family(compare_recovery, folder):
    return compare_recovery.Family.of_seed(0, folder, examples=8, validation=4, test=4)


def test_every_method_runs_and_a_second_run_takes_the_cache(compare_recovery, folder, monkeypatch):
    arguments = ["--families", str(folder), "--cache", str(folder / "cache.json"), *BRIEF]
    table = compare_recovery.main(arguments)
    assert [row[0] for row in table] == list(compare_recovery.METHODS)
    assert all(len(row) == len(compare_recovery.HEADER) + 1 for row in table)
    rows = {row[0]: row for row in table}
    assert rows["base"][2].startswith("0.00")
    assert rows["donor"][2].startswith("1.00")
    monkeypatch.setattr(compare_recovery.Family, "measure", lambda *_: pytest.fail("measured again"))
    assert compare_recovery.main(arguments) == table


def test_settings_are_chosen_by_validation_problems(compare_recovery, family, tmp_path):
    budget = compare_recovery.Budget(steps=2, row_steps=1, batch_size=6)
    study = compare_recovery.Study({0: family, 1: family}, budget, tmp_path / "cache.json")
    settings = [{"scale": scale} for scale in (0.2, 0.3, 0.4)]
    # (Spanish, German): the third recovers most and costs 0.2, the second costs 0.1; test problems say the first.
    validation = {0.2: (0.3, 0.9), 0.3: (0.5, 0.8), 0.4: (0.7, 0.7)}
    cached = {
        study.key("task arithmetic", setting, seed): {
            "validation": dict(zip(("es", "de"), validation[setting["scale"]], strict=True)),
            "test": dict.fromkeys(("es", "de", "en"), 1 - setting["scale"]),
        }
        for setting, seed in itertools.product(settings, (0, 1))
    }
    cached |= {study.key("base", {}, seed): {"validation": {"es": 0.1, "de": 0.9}} for seed in (0, 1)}
    (tmp_path / "cache.json").write_text(json.dumps(cached))
    study = compare_recovery.Study({0: family, 1: family}, budget, tmp_path / "cache.json")
    assert study.choose("task arithmetic", settings, max_drop=0.15, start="base") == {"scale": 0.3}
    assert study.choose("task arithmetic", settings, max_drop=0.25, start="base") == {"scale": 0.4}
    assert study.choose("task arithmetic", settings[1:], max_drop=0.05, start="base") == {"scale": 0.3}


def test_share_of_the_gap_and_points_lost(compare_recovery, family, tmp_path):
    budget = compare_recovery.Budget(steps=2, row_steps=1, batch_size=6)
    study = compare_recovery.Study({0: family}, budget, tmp_path / "cache.json")
    measured = {"base": (0.2, 0.9, 0.1), "donor": (1.0, 0.1, 1.0), "TIES": (0.8, 0.85, 0.5)}
    cached = {
        study.key(method, {}, 0): {"validation": {}, "test": dict(zip(("es", "de", "en"), values, strict=True))}
        for method, values in measured.items()
    }
    (tmp_path / "cache.json").write_text(json.dumps(cached))
    study = compare_recovery.Study({0: family}, budget, tmp_path / "cache.json")
    row = study.row("TIES", {}, start="base", end="donor")
    assert [cell.split()[0] for cell in row] == ["TIES", "0.800", "0.750", "0.850", "0.050", "0.500"]


def test_task_arithmetic_with_the_whole_difference_is_the_donor(compare_recovery, family):
    merged = importlib.import_module("tests.benchmarks.recovery.merging").with_task_arithmetic(family, 1.0)
    for mine, theirs in zip(merged.parameters(), family.donor().parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_batches_hold_the_stated_share_and_every_example_in_turn(compare_recovery, family):
    training = importlib.import_module("tests.benchmarks.recovery.training")
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, **_):
            seen.append([row.tolist() for row in input_ids])
            return type("Output", (), {"loss": self.weight.sum()})

    rates = []
    training.Loop(6, 0.3, 2 / 3, batch_size=6).run(Recorder(), family.training, rates.append)
    kept = [row.tolist() for row in family.training[Language.GERMAN][0]]
    assert all(sum(row in kept for row in batch) == 4 for batch in seen)
    drawn = [row for batch in seen for row in batch if row in kept]
    for start in range(0, 24, 8):
        assert sorted(drawn[start : start + 8]) == sorted(kept)
    assert rates == pytest.approx([0.3] * 5 + [0.15])
