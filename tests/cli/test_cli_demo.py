"""The demo, brief and whole, and its command."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import socket
import warnings

import datasets
import pytest
import torch
from huggingface_hub import constants as hub_constants
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from act_peft import ActError, ActValueError, ChannelMask, FittedTransfer
from act_peft.cli import main
from act_peft.demo import run as demo
from act_peft.demo.family import BASE
from act_peft.demo.run import DemoSettings, run_demo

BRIEF = DemoSettings(examples=16, steps=2, batch_size=8, problems=8)
ROWS = [
    "base",
    "donor",
    "fitted",
    "fitted, then fine-tuned",
    "control: no fit",
    "control: random channels",
    "interpolation",
    "ACT as in the paper",
]
STEPS = [
    "copy the two models",
    "measure base and donor",
    "fit",
    "fine-tune, save and reload",
    "merge, save and reload",
    "control: no fit",
    "control: random channels",
    "interpolation",
    "ACT as in the paper",
]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A brief run in a new folder: its result, its lines, its folder."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    lines = []
    return run_demo(folder, BRIEF, report=lines.append), lines, folder


@pytest.fixture
def finished(first, tmp_path):
    """A copy of the folder of the brief run."""
    return shutil.copytree(first[2], tmp_path / "copy")


class TestRun:
    def test_table(self, first):
        result, _, _ = first
        assert list(result.accuracies) == ROWS
        assert all(list(row) == ["es", "de", "en"] for row in result.accuracies.values())
        assert all(0 <= value <= 1 for row in result.accuracies.values() for value in row.values())
        assert result.reused == ()
        assert 0 < result.adapter_bytes < result.checkpoint_bytes

    def test_reports_every_step(self, first):
        steps = [line.partition(" (")[0] for line in first[1] if not line.startswith(("select", "done"))]
        assert steps == STEPS

    def test_files(self, first):
        result, _, folder = first
        assert all(path.exists() for path in result.paths.values())
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter",
            "base",
            "demo.png",
            "donor",
            "fitted.safetensors",
            "mask.safetensors",
            "merged",
            "results.json",
        ]
        mask = ChannelMask.load(result.paths["mask"])
        assert mask == FittedTransfer.load(result.paths["fitted"]).gains.top(0.5, scope="module")

    def test_adapter_and_merged_model_are_ordinary_and_agree(self, first):
        _, _, folder = first
        ids = torch.arange(4, 14).unsqueeze(0)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        with torch.inference_mode():
            torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)

    def test_controls_select_as_many_channels(self, first):
        mask = ChannelMask.load(first[0].paths["mask"])
        random = demo._random_like(mask, 0)
        assert {n: len(i) for n, i in random.items()} == {n: len(i) for n, i in mask.items()}
        assert random != mask
        assert random == demo._random_like(mask, 0) != demo._random_like(mask, 1)


def test_nothing_is_looked_up(tmp_path, monkeypatch):
    lookups = []
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: lookups.append(a))
    run_demo(tmp_path, BRIEF)
    assert lookups == []


class TestReuse:
    def test_second_run_reuses_everything(self, first, finished):
        lines = []
        result = run_demo(finished, BRIEF, report=lines.append)
        assert list(result.reused) == STEPS
        assert [line for line in lines if line.endswith("reused")] == [f"{step}: reused" for step in STEPS]
        assert result.accuracies == first[0].accuracies

    def test_another_density_fits_no_more(self, finished):
        settings = DemoSettings(examples=16, steps=2, batch_size=8, problems=8, density=0.1)
        assert list(run_demo(finished, settings).reused) == [*STEPS[:3], *STEPS[-2:]]

    @pytest.mark.parametrize("damage", ["lost", "changed", "more"])
    def test_damaged_files_are_made_again(self, first, finished, damage):
        file = finished / "adapter" / "adapter_model.safetensors"
        expected = file.read_bytes()
        if damage == "lost":
            file.unlink()
        elif damage == "changed":
            file.write_bytes(expected[:-1] + b"?")
        else:
            (finished / "adapter" / "more.txt").write_text("?")
        result = run_demo(finished, BRIEF)
        assert set(STEPS) - set(result.reused) == {"fine-tune, save and reload"}
        assert file.read_bytes() == expected
        assert not (finished / "adapter" / "more.txt").exists()

    def test_overwrite(self, finished):
        assert run_demo(finished, BRIEF, overwrite=True).reused == ()

    def test_interrupted_run_goes_on(self, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(demo._Demo, "_fine_tune", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_demo(tmp_path, BRIEF)
        assert list(run_demo(tmp_path, BRIEF).reused) == STEPS[:3]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"density": 0}, r"density: got 0, expected a number above 0 and at most 1"),
            ({"density": 1.5}, r"density: got 1.5, expected"),
            ({"transfer_scale": float("inf")}, r"transfer_scale: got inf, expected a finite number"),
            ({"keep_weight": -1}, r"keep_weight: got -1, expected"),
            ({"seed": -1}, r"seed: got -1, expected"),
        ],
    )
    def test_settings(self, changes, message):
        with pytest.raises(ActValueError, match=message):
            DemoSettings(**changes)

    def test_folder_of_something_else(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ActValueError, match="the folder holds something other than a demo"):
            run_demo(tmp_path, BRIEF)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ActValueError, match="got a file, expected a folder"):
            run_demo(tmp_path / "file", BRIEF)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "cannot be read"), ("[]", "cannot be read"), ('{"a": 1}', "the entries are not those of a demo")],
    )
    def test_record_of_something_else(self, tmp_path, text, message):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ActValueError, match=message):
            run_demo(tmp_path, BRIEF)

    def test_without_matplotlib_nothing_starts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ActError, match="matplotlib is not installed"):
            run_demo(tmp_path / "new", BRIEF)
        assert list(tmp_path.iterdir()) == []

    def test_density_that_selects_nothing(self, tmp_path):
        settings = DemoSettings(examples=16, steps=2, batch_size=8, problems=8, density=0.001)
        with pytest.raises(ActValueError, match=r"density: got 0.001, expected a share that selects at least one"):
            run_demo(tmp_path, settings)

    def test_adapter_that_reloads_differently(self, finished, monkeypatch):
        real = PeftModel.from_pretrained

        def wrong(*arguments, **options):
            model = real(*arguments, **options)
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "act_delta_" in n).add_(1)
            return model

        monkeypatch.setattr(PeftModel, "from_pretrained", wrong)
        with pytest.raises(ActError, match="answers differ after reloading, expected equal logits"):
            run_demo(finished, BRIEF, overwrite=True)

    def test_merged_model_that_answers_differently(self, finished, monkeypatch):
        monkeypatch.setattr(demo, "MERGED_TOLERANCE", -1.0)
        with pytest.raises(ActError, match=r"merged: logits differ from the adapter's by up to .*, expected at most"):
            run_demo(finished, BRIEF, overwrite=True)


def library_settings():
    return (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
        logging.getLogger("trl").level,
        hub_constants.HF_HUB_OFFLINE,
        torch.get_num_threads(),
        list(warnings.filters),
    )


def test_the_libraries_are_as_before_even_after_a_failure(tmp_path, monkeypatch):
    def failing(*_):
        assert library_settings() != before
        raise RuntimeError("inside")

    torch.set_num_threads(2)
    before = library_settings()
    monkeypatch.setattr(demo._Demo, "_copy_models", failing)
    with pytest.raises(RuntimeError, match="inside"):
        run_demo(tmp_path, BRIEF)
    assert library_settings() == before


class TestCommand:
    def test_prints_the_table_and_the_paths(self, finished, monkeypatch, capsys):
        calls = []

        def brief(output, settings, **options):
            calls.append((settings, options["overwrite"]))
            return run_demo(output, BRIEF, **options)

        monkeypatch.setattr(demo, "run_demo", brief)
        arguments = ["demo", "--output", str(finished), "--seed", "3", "--density", "0.5", "--keep-weight", "2"]
        assert main(arguments) == 0
        assert calls == [(DemoSettings(seed=3, density=0.5, keep_weight=2.0), False)]
        out, err = capsys.readouterr()
        assert err == ""
        assert f"{STEPS[0]}: reused" in out
        record = json.loads((finished / "results.json").read_text())
        line = next(line for line in out.splitlines() if line.startswith("fitted "))
        assert line.split()[1:] == [f"{value:.3f}" for value in record["fit"]["result"].values()]
        assert all(name in out for name in ROWS)
        assert str(finished / "adapter") in out
        assert f"checkpoint {(BASE / 'model.safetensors').stat().st_size / 1000:.0f} kB" in out

    def test_failure(self, tmp_path, capsys):
        assert main(["demo", "--output", str(tmp_path), "--density", "0"]) == 1
        assert capsys.readouterr().err.startswith("act-peft: density: got 0.0, expected a number above 0")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_demo_recovers_spanish_and_keeps_german(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    lines = []
    result = run_demo(tmp_path, report=lines.append)
    assert list(result.reused) == STEPS
    base, fitted, tuned = (result.accuracies[name] for name in ("base", "fitted", "fitted, then fine-tuned"))
    assert fitted["es"] > base["es"] + 0.5
    assert fitted["de"] >= base["de"] - 0.1
    assert tuned["es"] > base["es"] + 0.5
    assert tuned["de"] >= base["de"] - 0.05
    assert tuned["en"] > base["en"]
