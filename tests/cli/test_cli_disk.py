"""The commands that work on files, one after the other, on the shipped base and donor."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from act_peft import ChannelMask, ChannelScores
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with examples, and with what every command of the way wrote."""
    path = tmp_path_factory.mktemp("way")
    with open(path / "examples.jsonl", "w") as file:
        for row in rows(Language.SPANISH, Split.TRAIN, count=24):
            file.write(json.dumps(row) + "\n")
    models = ["--base", str(BASE), "--donor", str(DONOR)]
    way = [
        [
            *["localize", *models, "--dataset", str(path / "examples.jsonl"), "--device", "cpu"],
            *["--output", str(path / "scores.safetensors")],
        ],
        [
            *["select", str(path / "scores.safetensors"), "--density", "0.1", "--scope", "module"],
            *["--output", str(path / "mask.safetensors")],
        ],
        ["transfer", *models, "--mask", str(path / "mask.safetensors"), "--output", str(path / "ability")],
        ["merge", "--base", str(BASE), "--adapter", str(path / "ability"), "--output", str(path / "merged")],
    ]
    for command in way:
        assert main(command) == 0, command
    return path


def test_the_way_ends_in_a_model_that_plain_transformers_loads(folder):
    ids = torch.arange(4, 30)[None]
    base = AutoModelForCausalLM.from_pretrained(BASE)
    expected = PeftModel.from_pretrained(base, folder / "ability").merge_and_unload()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert torch.equal(merged(ids).logits, expected)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(BASE)(ids).logits, expected)


def test_export_lora_writes_an_adapter_of_stock_peft(folder, capsys):
    command = ["export-lora", str(folder / "ability"), "--output", str(folder / "lora")]
    assert main(command) == 1  # the mask has channels of norms
    assert "merge" in capsys.readouterr().err
    assert main([*command, "--biases", "modules_to_save", "--base", str(BASE), "--max-rank", "8"]) == 0
    printed = capsys.readouterr().out
    assert "rank 8" in printed
    assert "relative error" in printed
    assert json.loads((folder / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_export_lora_for_an_engine(folder, tmp_path, capsys):
    made = ["transfer", "--base", str(BASE), "--donor", str(DONOR), "--output", str(tmp_path / "act"), "--no-bias"]
    mask = ChannelMask.load(folder / "mask.safetensors")
    linear = {name: mask[name] for name in mask if "norm" not in name}
    ChannelMask(linear, {name: mask.num_channels[name] for name in linear}).save(tmp_path / "mask")
    assert main([*made, "--mask", str(tmp_path / "mask")]) == 0
    capsys.readouterr()
    export = ["export-lora", str(tmp_path / "act"), "--output", str(tmp_path / "lora"), "--target", "vllm"]
    assert main([*export, "--max-rank", "2"]) == 0
    before, written, error = capsys.readouterr().out.splitlines()
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert before == f"{tmp_path / 'lora'}: writing {size // 100_000 / 10:.1f} MB"
    assert written.startswith(f"{tmp_path / 'lora'}: LoRA adapter of {len(linear)} modules, rank 8, ")
    assert re.fullmatch(r"  relative error 0\.\d+, at most 0\.\d+ \(model\.\S+\); rank \d+ has 0\.05", error)
    assert main([*export, "--overwrite", "--biases", "lora_bias"]) == 1
    assert "biases: got 'lora_bias' with --target vllm, expected 'error'" in capsys.readouterr().err


def test_scores_and_mask_are_those_of_the_library(folder):
    scores = ChannelScores.load(folder / "scores.safetensors")
    assert not {"model.embed_tokens", "lm_head"} & set(scores)
    assert ChannelMask.load(folder / "mask.safetensors") == scores.top(0.1, scope="module")


def test_a_limit_for_each_module(folder, capsys):
    command = ["select", str(folder / "scores.safetensors"), "--density", "0.4", "--output", str(folder / "few")]
    assert main([*command, "--max-channels", "3"]) == 0
    mask = ChannelMask.load(folder / "few")
    assert {len(index) for index in mask.values()} == {3}
    assert main([*command, "--overwrite", "--max-channels", "0"]) == 1
    assert "max_channels: got 0, expected an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [
        ("scores.safetensors", "channel scores", {"channels", "mean", "max"}),
        ("mask.safetensors", "channel mask", {"selected", "channels"}),
        ("ability", "adapter", {"selected", "channels", "base"}),
    ],
)
def test_inspect_shows_what_is_there(folder, capsys, name, kind, first):
    assert main(["inspect", str(folder / name), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == kind
    assert first <= set(next(iter(summary["modules"].values())))
    assert main(["inspect", str(folder / name)]) == 0
    text = capsys.readouterr().out
    assert f"kind: {kind}" in text
    assert "modules by kind:" in text
    assert "model.layers.0." not in text
    assert main(["inspect", str(folder / name), "--all"]) == 0
    assert "model.layers.0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["localize", "--base", "x", "--donor", "x", "--dataset", "x"], "scores.safetensors"),
        (["select", "x", "--density", "0.1"], "mask.safetensors"),
        (["transfer", "--base", str(BASE), "--donor", str(DONOR), "--mask", "x"], "ability"),
        (["merge", "--base", str(BASE), "--adapter", "x"], "merged"),
    ],
)
def test_an_output_that_exists_is_refused(folder, capsys, command, output):
    if command[0] == "merge":
        command = [*command[:-1], str(folder / "ability")]
    if command[0] == "transfer":
        command = [*command[:-1], str(folder / "mask.safetensors")]
    assert main([*command, "--output", str(folder / output)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert output in error
    assert "overwrite" in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["select", "nowhere", "--density", "0.1", "--output", "{}/m"], "nowhere: no such file"),
        (["select", "{}/scores.safetensors", "--density", "1.5", "--output", "{}/m"], "density"),
        (["select", "{}/scores.safetensors", "--density", "0.1", "--output", "{}"], "got a folder"),
        (["select", "{}/scores.safetensors", "--density", "0.1", "--output", "{}/no/m"], "does not exist"),
        (["inspect", "{}/examples.jsonl"], "expected a whole safetensors file"),
        (["inspect", "{}/nothing"], "no such file"),
        (
            ["localize", "--base", "x", "--donor", "x", "--dataset", "{}/no", "--output", "{}/s"],
            "/no': there is no such file",
        ),
    ],
)
def test_failures_are_one_line(folder, capsys, command, message):
    assert main([part.format(folder) for part in command]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("act-peft: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["select", "{}/scores.safetensors", "--density", "0", "--output", "{}/m"], "selects none of 2400 channels"),
        (["select", "{}/scores.safetensors", "--density", "1e-9", "--output", "{}/m"], "(a higher --density)"),
        (["inspect", str(BASE)], "base: got a folder without adapter_config.json, expected an ACT adapter, or a file"),
        (["inspect", "{}/stock"], "stock: got an adapter of type LORA, expected an ACT adapter, or a file"),
        (["inspect", "{}/damaged"], "adapter_config.json: is not JSON"),
    ],
)
def test_what_is_none_of_ours_or_selects_nothing_is_refused(folder, capsys, command, message):
    lora = ["export-lora", str(folder / "ability"), "--output", str(folder / "stock"), "--base", str(BASE)]
    assert main([*lora, "--biases", "modules_to_save", "--overwrite"]) == 0
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged" / "adapter_config.json").write_text("{")
    capsys.readouterr()
    assert main([part.format(folder) for part in command]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
    assert not (folder / "m").exists()


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["merge", "--base", str(BASE), "--adapter", "{}/ability", "--output", "{}/merged"], "or pass --overwrite)"),
        (["combine", "{}/ability", "--output", "{}/merged"], "or pass --overwrite)"),
        (["export-lora", "{}/ability", "--output", "{}/merged"], "or pass --biases modules_to_save to save"),
        (
            ["export-lora", "{}/ability", "--output", "{}/merged", "--biases", "modules_to_save"],
            "base: needed for --biases modules_to_save of an adapter on disk",
        ),
    ],
)
def test_hints_name_options_of_the_command(folder, tmp_path, capsys, command, hint):
    if "--biases" in hint:
        command = [part.replace("{}/merged", str(tmp_path / "lora")) for part in command]
    assert main([part.format(folder) for part in command]) == 1
    error = capsys.readouterr().err
    assert hint in error
    assert "=True" not in error
    assert "biases='" not in error


def test_overwrite_replaces(folder, capsys):
    way = ["select", str(folder / "scores.safetensors"), "--density", "0.1", "--scope", "module"]
    assert main([*way, "--output", str(folder / "mask.safetensors"), "--overwrite"]) == 0
    assert "ChannelMask(" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_failure(folder):
    script = f"{sys.executable} -W ignore -m act_peft inspect {folder / 'scores.safetensors'} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "kind: channel scores\n"), done.stderr
    assert "act-peft:" not in done.stderr  # other packages may say something while they are imported
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["select"], ["merge", "--base", "x"], ["nonsense"], []])
def test_bad_arguments_end_with_two(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
