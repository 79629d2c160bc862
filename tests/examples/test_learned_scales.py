"""The example runs as a user starts it, and what it writes is an ordinary adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language

SCRIPT = Path(__file__).parents[2] / "examples" / "learned_scales.py"


def start(*arguments, folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.slow
def test_writes_a_pruned_adapter(tmp_path):
    for language in (Language.SPANISH, Language.GERMAN):
        lines = [json.dumps(row) + "\n" for row in rows(language, Split.TRAIN, count=24)]
        (tmp_path / f"{language.value}.jsonl").write_text("".join(lines))
    done = start(
        *("--base", BASE, "--donor", DONOR, "--dataset", "es.jsonl", "--keep-dataset", "de.jsonl"),
        *("--output", tmp_path / "ability", "--l1", 0.5, "--scale-steps", 15),
        *("--row-steps", 3, "--samples", 20, "--batch-size", 8, "--keep-batch-size", 8),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"adapter: {tmp_path / 'ability'}" in done.stdout
    config = json.loads((tmp_path / "ability" / "adapter_config.json").read_text())
    assert config["trainable"] == "deltas"
    assert f"channels left: {config['density']:.1%} of all" in done.stdout
    assert 0 < config["density"] < 1  # some scales became zero
    tensors = load_file(tmp_path / "ability" / "adapter_model.safetensors")
    assert not any("channel_scale" in name for name in tensors)

    batch = AutoTokenizer.from_pretrained(BASE)(["dos mas tres igual"], return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.inference_mode():
        before = base(**batch).logits
        assert not torch.equal(PeftModel.from_pretrained(base, tmp_path / "ability").eval()(**batch).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["--batch-size", "--keep-batch-size"])
def test_a_batch_that_does_not_divide_is_refused(tmp_path, size):
    arguments = ("--base", BASE, "--donor", DONOR, "--dataset", "none", "--keep-dataset", "none", "--output", tmp_path)
    done = start(*arguments, size, 10, folder=tmp_path)
    assert done.returncode == 2
    assert f"{size} must be a multiple of --micro-batch-size" in done.stderr
