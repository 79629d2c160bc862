"""`act-peft combine` writes what the library writes and says where the adapters conflict."""

from __future__ import annotations

import json

import pytest

from act_peft import combine, find_conflicts
from act_peft.cli import main
from tests.support.tiny_checkpoints import save_adapter, save_relatives


@pytest.fixture
def folder(tmp_path):
    save_relatives(tmp_path, "llama")
    for seed, name in enumerate(("science", "law", "art")):
        save_adapter(tmp_path / name, seed=seed)
    return tmp_path


def run(folder, *arguments):
    return main(["combine", *(argument.format(folder) for argument in arguments)])


def test_it_writes_the_files_of_the_library_and_prints_the_totals(folder, capsys):
    settings = ["--weights", "1", "-0.5", "--combination-type", "ties", "--density", "0.5"]
    settings += ["--majority-sign-method", "frequency", "--base", "{}/base"]
    assert run(folder, "{}/science", "{}/law", *settings, "--output", "{}/both") == 0
    lines = capsys.readouterr().out.splitlines()
    result = combine(
        [folder / "science", folder / "law"],
        folder / "expected",
        weights=[1, -0.5],
        combination_type="ties",
        density=0.5,
        majority_sign_method="frequency",
        base=folder / "base",
    )
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (folder / "both" / name).read_bytes() == (folder / "expected" / name).read_bytes()
    assert lines[0] == f"{folder}/both: adapter of {result.num_channels} channels in {result.num_modules} modules"
    assert lines[1].split() == ["module", "adapters", "shared", "cosine", "cancelled"]
    assert lines[2].startswith("all modules  science × law")
    assert len(lines) == 3


def test_the_report_names_every_module(folder, capsys):
    inputs = ["{}/science", "{}/law", "{}/art"]
    assert run(folder, *inputs, "--output", "{}/all", "--report") == 0
    printed = capsys.readouterr().out
    report = find_conflicts([folder / name for name in ("science", "law", "art")])
    assert printed.splitlines()[1:] == str(report).splitlines()
    assert run(folder, *inputs, "--output", "{}/all", "--report", "--json", "--overwrite") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["conflicts"] == report.to_dict()
    assert written["output"] == f"{folder}/all"
    assert run(folder, *inputs, "--output", "{}/all", "--json", "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["conflicts"] == report.only_totals().to_dict()


def test_one_adapter_is_scaled_and_has_no_conflicts(folder, capsys):
    assert run(folder, "{}/science", "--weights", "0.5", "--output", "{}/half") == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1"], "weights: got 1, expected one for each of the 2 adapters"),
        (["--combination-type", "svd"], "combines the factors of LoRA"),
        (["--density", "0.5"], "density: got 0.5"),
        (["--base", "{}/nowhere"], "nowhere"),
    ],
)
def test_failures_are_one_line(folder, capsys, arguments, message):
    assert run(folder, "{}/science", "{}/law", "--output", "{}/both", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("act-peft: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (folder / "both").exists()
