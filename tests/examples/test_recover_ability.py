"""The example runs as a user starts it, and what it writes loads."""

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

from act_peft import ChannelScores
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, accuracy, rows
from act_peft.demo.words import Language

SCRIPT = Path(__file__).parents[2] / "examples" / "recover_ability.py"


def start(*arguments, folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )


def examples_of(folder, language, count=24):
    file = folder / f"{language.value}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(language, Split.TRAIN, count=count)))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fitted", "paper"])
def test_writes_an_adapter_and_a_merged_model(tmp_path, method):
    ability, keep = (examples_of(tmp_path, language) for language in (Language.SPANISH, Language.GERMAN))
    data = ["--dataset", ability, *(["--keep-dataset", keep] if method == "fitted" else [])]
    done = start(
        *("--method", method, "--base", BASE, "--donor", DONOR, *data, "--output", tmp_path / "ability"),
        *("--merged-output", tmp_path / "merged", "--samples", 20, "--batch-size", 8, "--seed", 1),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"adapter: {tmp_path / 'ability'}" in done.stdout
    assert f"merged model: {tmp_path / 'merged'}" in done.stdout

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(["dos mas tres igual"], return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.inference_mode():
        before = base(**batch).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "ability").eval()(**batch).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**batch).logits
    assert not torch.equal(adapted, before)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)  # the merged weights are rounded once more
    config = json.loads((tmp_path / "ability" / "adapter_config.json").read_text())
    selected = sum(entry["selected"] for entry in config["adapted_modules"].values())
    if method == "paper":
        scores = ChannelScores.load(tmp_path / "ability" / "scores.safetensors")
        assert selected == scores.top(0.2, scope="module").num_selected
        assert config["transfer_scale"] == 0.3
        assert not {"model.embed_tokens", "lm_head"} & set(scores)
    else:
        channels = sum(entry["channels"] for entry in config["adapted_modules"].values())
        assert selected == pytest.approx(channels / 2, abs=len(config["adapted_modules"]))
        assert config["trainable_token_indices"]  # half of the tokens of the embedding
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(load_file(BASE / "model.safetensors"))


@pytest.mark.slow
def test_the_fit_alone_recovers(tmp_path):
    ability, keep = (examples_of(tmp_path, language, count=200) for language in (Language.SPANISH, Language.GERMAN))
    done = start(
        *("--base", BASE, "--donor", DONOR, "--dataset", ability, "--keep-dataset", keep, "--steps", 0),
        *("--density", 1, "--output", tmp_path / "ability"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "ability").eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    spanish, german = (
        accuracy(model, tokenizer, rows(language, Split.TEST, count=100))
        for language in (Language.SPANISH, Language.GERMAN)
    )
    assert spanish > 0.7  # the base: 0.06
    assert german > 0.8


@pytest.mark.slow
def test_the_fit_needs_data_to_keep(tmp_path):
    done = start("--base", BASE, "--donor", DONOR, "--dataset", "none", "--output", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert "--method fitted needs --keep-dataset" in done.stderr


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = start(
        *("--base", BASE, "--donor", DONOR, "--dataset", "none", "--output", tmp_path, "--batch-size", 10),
        folder=tmp_path,
    )
    assert done.returncode == 2
    assert "--batch-size must be a multiple of --micro-batch-size" in done.stderr
