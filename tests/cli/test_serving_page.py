"""The commands of the page about serving, up to the engines themselves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import ActConfig
from act_peft.cli import main
from act_peft.demo.family import BASE
from tests.support.engines import ENGINES
from tests.support.exports import config_of

PAGE = (Path(__file__).parents[2] / "examples" / "README.md").read_text(encoding="utf-8").split("## Serving")[1]
BLOCKS = ["\n".join(block.splitlines()) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("act-peft ")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    channels = {"q_proj": list(range(3)), "v_proj": [1], "down_proj": [0, 5]}
    config = ActConfig(channels=channels, init_weights=False, include_bias=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "ability", lora_twin=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(here, command, capsys):
    assert len(COMMANDS) == 4
    words = [str(BASE) if word == "BASE" else word for word in shlex.split(command)[1:]]
    assert main(words) == 0, capsys.readouterr().err
    if "--target" not in words:
        AutoModelForCausalLM.from_pretrained("merged")
        return
    output, target = (words[words.index(option) + 1] for option in ("--output", "--target"))
    assert all(torch.isfinite(change).all() for change in ENGINES[target](here / output).values())
    block = next(block for block in BLOCKS if command in block)
    assert output in block.replace(command, "")  # what is exported is what is served
    if "--max-lora-rank" in block:
        assert config_of(here / output)["r"] <= int(re.search(r"--max-lora-rank (\d+)", block)[1])
