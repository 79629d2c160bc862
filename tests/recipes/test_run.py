"""Recipes from beginning to end on the demo's models; interrupted runs go on, and cards run again."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import act_peft
from act_peft import ActValueError, ChannelMask, Evaluation
from act_peft.cli import main
from act_peft.demo.examples import BASE
from act_peft.demo.recipes import copy_recipe
from act_peft.recipes.reading import read_recipe
from act_peft.recipes.run import run_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ROOT = Path(act_peft.__file__).parent.parent
IDS = torch.arange(4, 30)[None]
SMALL = """
base: base
donor: donor
abilities: {spanish: {train: spanish-train.jsonl, test: spanish-test.jsonl}}
keep: {german: {train: german-train.jsonl}}
reading: {samples: 24, test_samples: 16}
"""
TRAIN = "train: {steps: 4, batch_size: 8, micro_batch_size: 4, learning_rate: 5e-4}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's models and examples."""
    return copy_recipe("recover", tmp_path_factory.mktemp("recipes") / "try").parent


def run(folder, text, name, **options):
    path = folder / f"{name}.yaml"
    path.write_text(SMALL + text)
    lines = []
    result = run_recipe(read_recipe(path), output=folder / name, report=lines.append, **options)
    return result, lines


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def adapted(folder, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)


def test_fit_train_merge_and_again(folder):
    result, lines = run(folder, f"select: {{tokens: 0}}\n{TRAIN}output: {{merged: true}}", "whole")
    assert list(result.evaluation.results) == ["base", "donor", "transferred", "fine-tuned"]
    base, moved = (result.evaluation.results[name]["spanish"] for name in ("base", "transferred"))
    assert moved.loss < 0.5 * base.loss
    assert len(base.samples.tokens) == 16
    assert any("(test): only" in line for line in lines)  # few answer tokens are said
    assert not (folder / "whole" / "training").exists()
    merged = AutoModelForCausalLM.from_pretrained(folder / "whole" / "merged")
    expected = logits(adapted(folder, folder / "whole" / "adapter"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    saved = Evaluation.from_dict(json.loads((folder / "whole" / "evaluation.json").read_text()))
    assert str(saved) == str(result.evaluation)

    again, _ = run(folder, f"select: {{tokens: 0}}\n{TRAIN}output: {{merged: true}}", "whole")
    assert len(again.reused) == 7
    assert again.evaluation.to_dict() == result.evaluation.to_dict()

    other, _ = run(folder, "select: {tokens: 0, density: 0.25}\n", "whole")
    assert other.reused == ("measure base and donor", "fit")
    assert ChannelMask.load(other.paths["mask"]).density == pytest.approx(0.25, abs=0.01)
    assert "fine-tuned" not in other.evaluation.results

    from_card = read_recipe(folder / "whole" / "adapter")
    third = run_recipe(from_card, output=folder / "third")
    assert third.evaluation.to_dict() == other.evaluation.to_dict()


@pytest.mark.filterwarnings("ignore:lm_head. vLLM loads factors of embeddings:act_peft.ActWarning")
@pytest.mark.parametrize("target", ["peft", "vllm"])
def test_a_lora_for_other_tools_holds_what_it_can(folder, target):
    result, _ = run(folder, f"output: {{lora_rank: 60, lora_target: {target}}}", f"export-{target}")
    assert not any("norm" in name for name in ChannelMask.load(result.paths["mask"]))
    config = json.loads((result.paths["lora"] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"] == 64) == (target == "vllm")  # a rank that it accepts
    expected = logits(adapted(folder, result.paths["adapter"]))
    torch.testing.assert_close(logits(adapted(folder, result.paths["lora"])), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def biased(folder):
    """Base and donor with biases, beside the others."""
    for name in ("base", "donor"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, attention_bias=True)
        torch.manual_seed(len(name))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias, std=0.1)
        model.save_pretrained(folder / f"biased-{name}")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / name / file, folder / f"biased-{name}" / file)
    return SMALL.replace("base: base", "base: biased-base").replace("donor: donor", "donor: biased-donor")


@pytest.mark.filterwarnings("ignore:lm_head. vLLM loads factors of embeddings:act_peft.ActWarning")
@pytest.mark.parametrize("method", ["fit", "localize\nlocalize: {score: weight}"])
def test_biases_do_not_move_where_a_lora_is_asked_for(folder, biased, method):
    text = f"{biased}method: {method}\noutput: {{lora_rank: 128, lora_target: vllm}}\n"
    path = folder / "biased.yaml"
    path.write_text(text)
    result = run_recipe(read_recipe(path), output=folder / f"biased-{method[:3]}")
    base = AutoModelForCausalLM.from_pretrained(folder / "biased-base")
    model = PeftModel.from_pretrained(base, result.paths["adapter"])
    assert not model.peft_config["default"].include_bias
    expected = logits(model)
    lora = PeftModel.from_pretrained(model.unload(), result.paths["lora"])
    torch.testing.assert_close(logits(lora), expected, rtol=1e-3, atol=1e-3)


def test_what_the_target_cannot_load_ends_before_the_fine_tune(folder):
    text = SMALL.replace("spanish-train", "german-train")
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=AutoConfig.from_pretrained(BASE).vocab_size)
    for name in ("base", "donor"):
        GPT2LMHeadModel(config).save_pretrained(folder / f"gpt2-{name}")
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / f"gpt2-{name}")
        text = text.replace(f"{name}: {name}", f"{name}: gpt2-{name}")
    path = folder / "gpt2.yaml"
    path.write_text(f"{text}{TRAIN}output: {{lora_rank: 8, lora_target: llama.cpp}}\n")
    lines = []
    with pytest.raises(ActValueError, match=r"llama\.cpp cannot load factors of GPT-2's"):
        run_recipe(read_recipe(path), output=folder / "gpt2", report=lines.append)
    assert lines[-1].startswith("fit")


@pytest.mark.parametrize("score", ["activation", "weight", "contrast"])
def test_the_papers_way(folder, score):
    settings = f"method: localize\nlocalize: {{score: {score}, transfer_scale: 0.4}}\nselect: {{density: 0.2}}\n"
    result, _ = run(folder, settings, f"paper-{score}")
    base, moved = (result.evaluation.results[name]["spanish"] for name in ("base", "transferred"))
    assert moved.loss < base.loss
    assert adapted(folder, result.paths["adapter"]).peft_config["default"].transfer_scale == 0.4


def test_lora_with_teachers(folder):
    text = TRAIN.replace("}", ", donor_weight: 1, report_to: []}")
    result, _ = run(folder, f"method: lora\nlora: {{rank: 4}}\n{text}", "lora")
    assert list(result.evaluation.results) == ["base", "donor", "fine-tuned"]
    record = json.loads((folder / "lora" / "results.json").read_text())
    log = record["fine-tune"]["result"]
    assert any("keep_divergence" in entry and "donor_divergence" in entry for entry in log)
    merged, _ = run(folder, f"method: lora\nlora: {{rank: 4}}\n{text}output: {{merged: true}}", "lora")
    model = AutoModelForCausalLM.from_pretrained(merged.paths["merged"])
    torch.testing.assert_close(logits(model), logits(adapted(folder, merged.paths["adapter"])), rtol=1e-3, atol=1e-3)


def test_folders_and_examples_that_do_not_fit(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    recipe = read_recipe(folder / "recover.yaml")
    with pytest.raises(ActValueError, match="holds something other than a recipe"):
        run_recipe(recipe, output=tmp_path / "full")
    (folder / "bare.yaml").write_text(SMALL)
    with pytest.raises(ActValueError, match=r"output\.folder is missing"):
        run_recipe(read_recipe(folder / "bare.yaml"))
    (folder / "one.jsonl").write_text((folder / "german-train.jsonl").read_text().splitlines()[0])
    text = (SMALL + "output: {folder: few}").replace("german-train", "one")
    (folder / "few.yaml").write_text(text)
    with pytest.raises(ActValueError, match=r"german: got 1 examples, expected enough to hold out 0\.2"):
        run_recipe(read_recipe(folder / "few.yaml"))
    with pytest.raises(ActValueError, match=r"select\.density: got 1e-09, expected a share"):
        run(folder, "select: {density: 1.0e-9}\n", "nothing")


def test_the_commands(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    Path("small.yaml").write_text(SMALL + f"select: {{tokens: 0}}\n{TRAIN}output: {{folder: command}}")
    assert main(["run", "small.yaml", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "2. fit the donor's difference on spanish, keeping german (keep_weight 3)" in plan
    assert "base: 0.2 million parameters, 0.9 MB on disk" in plan
    assert not Path("command").exists()
    assert main(["run", "small.yaml"]) == 0
    out = capsys.readouterr().out
    assert "fine-tuned" in out
    assert "command/adapter" in out
    command = "eval --base base --adapter command/adapter --model donor --dataset spanish-test.jsonl --samples 16"
    assert main([*command.split(), "--device", "cpu", "--json", "--output", "eval.json"]) == 0
    found = Evaluation.from_dict(json.loads(capsys.readouterr().out))
    assert found == Evaluation.from_dict(json.loads(Path("eval.json").read_text()))
    ours = json.loads(Path("command/evaluation.json").read_text())
    assert found.results["command/adapter"]["spanish-test"].loss == pytest.approx(
        ours["fine-tuned"]["spanish"]["loss"]
    )
    assert main(["recipes"]) == 0
    assert "recover       Recover: bring back" in capsys.readouterr().out
    assert main(["recipes", "keep", "--output", "copied"]) == 0
    assert "act-peft run copied/keep.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        ("run none.yaml", 1, "none.yaml: there is no such file"),
        ("run bare.yaml", 1, "bare.yaml: output.folder is missing"),
        ("recipes none --output x", 1, "recipe: got 'none'"),
        ("recipes --output x", 2, "expected together with the name of a recipe"),
        ("eval --base base --dataset spanish-test.jsonl spanish-test.jsonl", 2, "expected each once"),
        ("eval --base base --adapter ./none --dataset spanish-test.jsonl", 1, "no such folder"),
        ("train --base base --adapter x --dataset spanish-train.jsonl --donor donor --output t", 2, "with --mask"),
        (
            "train --base base --lora-rank 2 --dataset x --update-size 6 --output t",
            2,
            "a multiple of",
        ),
        ("train --base base --lora-rank 2 --dataset x --steps 0 --output t", 2, "--steps: got 0, input should be"),
        ("train --base base --lora-rank 2 --dataset x --trainer distillation --output t", 2, "--teacher"),
        (
            "train --base base --lora-rank 2 --dataset spanish-train.jsonl --trainer dpo --output t",
            1,
            "chosen is",
        ),
        ("train --base base --lora-rank 2 --dataset spanish-train.jsonl --output base", 1, "exists, expected a new"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, command, status, line):
    monkeypatch.chdir(folder)
    (folder / "bare.yaml").write_text(SMALL)
    before = sorted(os.listdir(folder))
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            main(command.split())
    else:
        assert main(command.split()) == status
    err = capsys.readouterr().err
    assert line in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [name for name in sorted(os.listdir(folder)) if name not in before] in ([], ["t.training"])


@pytest.mark.parametrize("start", ["--lora-rank 2", "--mask whole/mask.safetensors --donor donor"])
def test_train(folder, capsys, monkeypatch, start):
    monkeypatch.chdir(folder)
    if "mask" in start:
        run(folder, "select: {tokens: 0}\n", "whole")
    output = f"trained{len(start)}"
    data = "--dataset spanish-train.jsonl --keep-dataset german-train.jsonl --samples 16 --steps 2 --device cpu"
    assert main(f"train --base base {start} {data} --teacher donor --output {output}".split()) == 0
    assert f"{output}: adapter" in capsys.readouterr().out
    trained = logits(adapted(folder, output))
    assert not torch.equal(trained, logits(AutoModelForCausalLM.from_pretrained(folder / "base")))
    assert not Path(f"{output}.training").exists()
    assert main(f"train --base base --adapter {output} {data} --output {output}b".split()) == 0
    assert not torch.equal(logits(adapted(folder, f"{output}b")), trained)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["dpo", "distillation"])
def test_train_with_other_trainers(folder, monkeypatch, trainer):
    if trainer == "distillation":
        pytest.importorskip("trl", minversion="1.16")
    monkeypatch.chdir(folder)
    rows = [json.loads(line) for line in Path("spanish-train.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in itertools.pairwise(rows)
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    command = f"train --base base --lora-rank 2 --dataset pairs.jsonl --trainer {trainer} --teacher donor --steps 2"
    assert main(f"{command} --keep-dataset german-train.jsonl --device cpu --output {trainer}".split()) == 0
    assert sorted(path.name for path in Path(trainer).iterdir() if path.is_dir()) == []
    adapted(folder, trainer)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(folder):
    text = SMALL + "select: {tokens: 0}\n" + TRAIN.replace("steps: 4", "steps: 40")
    (folder / "killed.yaml").write_text(text)
    whole = run_recipe(read_recipe(folder / "killed.yaml"), output=folder / "not-killed")
    command = [sys.executable, "-m", "act_peft", "run", "killed.yaml", "--output", "killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    training = folder / "killed" / "training"
    limit = time.monotonic() + 300
    while not list(training.glob("*/checkpoint-10/trainer_state.json")) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "killed" / "adapter").exists()
    lines = []
    result = run_recipe(read_recipe(folder / "killed.yaml"), output=folder / "killed", report=lines.append)
    assert any(line.startswith("fine-tune: goes on from checkpoint-") for line in lines)
    expected = logits(adapted(folder, whole.paths["adapter"]))
    torch.testing.assert_close(logits(adapted(folder, result.paths["adapter"])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recover", "specialists", "keep"])
def test_ready_recipes_do_what_they_say(tmp_path, name):
    path = copy_recipe(name, tmp_path / name)
    found = run_recipe(read_recipe(path)).evaluation.results
    first, last = next(iter(found)), list(found)[-1]
    abilities = ["spanish", "english"] if name == "specialists" else ["spanish"]
    for skill in abilities:
        assert found[last][skill].accuracy > found[first][skill].accuracy + 0.25
    assert found[last]["german"].accuracy > found[first]["german"].accuracy - 0.03
