"""Commands run no code of a stranger, and replace no file that appears while they work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from act_peft import ChannelScores
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR
from act_peft.disk import atomic

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture
def evil(tmp_path):
    """A donor that brings code: it leaves a file behind when it runs."""
    folder = tmp_path / "evil"
    shutil.copytree(DONOR, folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    code += (
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Words\n"
    )
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("as_base", [False, True])
@pytest.mark.parametrize("command", ["localize", "fit", "sweep", "transfer", "merge", "train", "eval"])
def test_no_code_of_a_checkpoint_runs(evil, tmp_path, capsys, monkeypatch, command, as_base):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "data.jsonl").write_text('{"prompt": "3 plus 4 ", "completion": "is 7"}\n' * 8)
    ChannelScores({"lm_head": torch.ones(4)}, 1).save(tmp_path / "scores")
    ChannelScores({"lm_head": torch.ones(4)}, 1).top(0.5).save(tmp_path / "mask")
    base, donor = (evil, DONOR) if as_base else (BASE, evil)
    arguments = {
        "localize": ["--donor", donor, "--score", "weight", "--output", tmp_path / "out"],
        "fit": ["--donor", donor, "--dataset", tmp_path / "data.jsonl", "--output", tmp_path / "out"],
        "sweep": ["--donor", donor, "--dataset", tmp_path / "data.jsonl", "--keep-dataset", tmp_path / "data.jsonl"],
        "transfer": ["--donor", donor, "--mask", tmp_path / "mask", "--output", tmp_path / "out"],
        "merge": ["--adapter", donor, "--output", tmp_path / "out"],
        "train": [
            "--lora-rank",
            "4",
            "--teacher",
            donor,
            "--dataset",
            tmp_path / "data.jsonl",
            "--output",
            tmp_path / "out",
        ],
        "eval": ["--model", donor, "--dataset", tmp_path / "data.jsonl"],
    }[command]
    assert main([command, "--base", str(base), *map(str, arguments)]) == 1
    assert not (tmp_path / "ran").exists()
    assert len(capsys.readouterr().err.splitlines()) >= 1


@pytest.mark.parametrize("name", ["scores", "mask"])
def test_a_file_that_appears_while_a_command_works_stays(tmp_path, capsys, monkeypatch, name):
    ChannelScores({"a": torch.arange(9.0)}, 1).save(tmp_path / "input")
    rename = atomic.rename_new

    def appear(source, target):
        target.write_text("mine")
        rename(source, target)

    monkeypatch.setattr(atomic, "rename_new", appear)
    command = {
        "scores": ["localize", "--base", BASE, "--donor", DONOR, "--score", "weight", "--device", "cpu"],
        "mask": ["select", tmp_path / "input", "--density", "0.5"],
    }[name]
    assert main([*map(str, command), "--output", str(tmp_path / "out")]) == 1
    assert "exists, and did not when this run began" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_device_is_no_output(tmp_path, capsys):
    ChannelScores({"a": torch.arange(9.0)}, 1).save(tmp_path / "input")
    assert main(["select", str(tmp_path / "input"), "--density", "1", "--output", "/dev/null", "--overwrite"]) == 1
    assert "got no regular file" in capsys.readouterr().err


@pytest.mark.slow
def test_yes_is_no_consent(evil, tmp_path):
    line = [sys.executable, "-m", "act_peft", "localize", "--base", str(BASE), "--donor", str(evil)]
    line += ["--score", "weight", "--output", str(tmp_path / "out")]
    done = subprocess.run(line, input="y\n" * 20, capture_output=True, text=True)
    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()
