"""Some cases of `tests.fuzz`, always the same: no error of other code, no hang, nothing accepted that is wrong."""

from __future__ import annotations

import pytest

from tests.fuzz.run import Case, Outcome, files_of, run_case, run_cases, table
from tests.fuzz.targets import TARGETS, Target, make_originals


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    make_originals(folder)
    return folder


def check(cases: list[Case]) -> None:
    faults = [str(case) for case in cases if case.outcome.is_fault]
    assert not faults, "\n".join([*faults, table(cases)])
    refused = sum(case.outcome in (Outcome.OURS, Outcome.FOREIGN) for case in cases)
    assert refused > 0.6 * len(cases), table(cases)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_harmless(originals, tmp_path):
    check(list(run_cases(range(5 * len(TARGETS)), originals, tmp_path / "work")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_files_are_refused_or_harmless(originals, tmp_path):
    check(list(run_cases(range(80 * len(TARGETS)), originals, tmp_path / "work", seed=2)))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_file_of_a_target_exists(originals, target):
    assert files_of(target, originals)


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (lambda folder, file: {"a": 1}, Outcome.EQUAL),
        (lambda folder, file: folder.joinpath("mask").read_bytes(), Outcome.DIFFERENT),
        (lambda folder, file: {}["x"], Outcome.BARE),
    ],
)
def test_outcomes_are_told_apart(originals, tmp_path, run, outcome):
    target = Target("a target", ("mask",), run)
    whole = {("a target", "mask"): ""} if outcome is Outcome.BARE else {}
    found = {run_case(target, f"{number}", originals, tmp_path / "work", whole).outcome for number in range(40)}
    assert outcome in found
