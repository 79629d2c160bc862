"""The Python of README and guide runs as it stands there, and their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from act_peft.cli import build_parser
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_readme_is_short():
    assert len(README.split()) <= 1500


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries below TRL
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # no accelerator
def test_the_readmes_script_runs_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(README)
    exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"spanish +donor +500 ", capsys.readouterr().out)
    assert (tmp_path / "recovered" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries below TRL
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # no accelerator
def test_the_guides_scripts_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in python_blocks(GUIDE) if "from trl import Distillation" not in block][:3]
    ability, keep = (rows(language, Split.TRAIN, count=16) for language in (Language.SPANISH, Language.GERMAN))
    data = {"dataset": Dataset.from_list(ability), "keep_dataset": Dataset.from_list(keep)}
    namespace = {"BASE": str(BASE), "DONOR": str(DONOR), **data}
    # TRL's default is bfloat16 on an accelerator, and these tests have none.
    fit_block, *blocks = (
        block.replace('output_dir="training"', 'output_dir="training", use_cpu=True, report_to="none"')
        for block in blocks
    )
    exec(compile(fit_block, "guide", "exec"), {**namespace})
    recovered = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "recovered")
    assert recovered.peft_config["default"].density == pytest.approx(0.5, abs=0.01)

    exec(compile(blocks[0], "guide", "exec"), namespace)
    ids = torch.arange(4, 20)[None]
    merged = namespace["merged"].float().eval()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "ability").eval()
    torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)

    block = blocks[1].replace("max_steps=150", "max_steps=15")
    exec(compile(block, "guide", "exec"), namespace)
    assert namespace["model"].peft_config["default"].density < 0.99  # some scales became zero
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "ability")
    learned, stored = namespace["model"].state_dict(), loaded.state_dict()
    assert learned.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in learned.items())
    assert loaded.peft_config["default"].trainable == "deltas"


def test_the_commands_exist():
    commands = re.findall(r"^\$ act-peft (.+)$", README + GUIDE, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        assert build_parser().parse_args(command.split()).run
