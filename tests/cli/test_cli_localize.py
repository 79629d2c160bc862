"""`act-peft localize` with an adapter as donor and with every kind of score, on the shipped base and donor."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import ChannelScores, localize
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from act_peft.donors import is_adapter
from act_peft.scores import ScoreKind

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with examples of two skills and a trained-looking LoRA of the base, alone and merged."""
    path = tmp_path_factory.mktemp("localize")
    for language in (Language.SPANISH, Language.GERMAN):
        with open(path / f"{language.value}.jsonl", "w") as file:
            for row in rows(language, Split.TRAIN, count=8):
                file.write(json.dumps(row) + "\n")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    model.save_pretrained(path / "lora")
    model.merge_and_unload().save_pretrained(path / "merged")
    return path


def scores_of(folder, *arguments, donor=DONOR, ability=True):
    data = ["--dataset", str(folder / f"{Language.SPANISH.value}.jsonl")] if ability else []
    output = folder / "scores"
    command = ["localize", "--base", str(BASE), "--donor", str(donor), *data, "--output", str(output), "--overwrite"]
    assert main([*command, "--device", "cpu", *arguments]) == 0
    return ChannelScores.load(output)


def assert_close(got, expected):
    assert list(got) == list(expected)
    for name in got:  # an adapter beside its layer rounds differently from one merged into it
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_an_adapter_as_donor(folder):
    assert is_adapter(str(folder / "lora"))
    assert not is_adapter(str(folder / "merged"))
    scores = scores_of(folder, donor=folder / "lora")
    assert_close(scores, scores_of(folder, donor=folder / "merged"))
    assert "model.layers.0.mlp.up_proj" in scores
    assert scores["lm_head"].max() > 0


def test_a_whole_model_with_an_adapter_beside_it_is_a_model(folder):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    both = folder / "both"
    model.save_pretrained(both)
    PeftModel.from_pretrained(model, folder / "lora").save_pretrained(both)
    assert not is_adapter(str(both))


def test_weights_need_no_examples(folder, capsys):
    scores = scores_of(folder, "--score", "weight", ability=False)
    assert re.search(r"scores of \d+ channels in \d+ modules, by weight\n", capsys.readouterr().out)
    base, donor = (AutoModelForCausalLM.from_pretrained(path) for path in (BASE, DONOR))
    assert scores == localize(base, donor, score="weight")


def test_attribution_with_a_skill_to_keep(folder):
    ability = scores_of(folder, "--score", "attribution", "--target-modules", "lm_head")
    keep = ["--keep-dataset", str(folder / f"{Language.GERMAN.value}.jsonl")]
    both = scores_of(folder, "--score", "attribution", "--target-modules", "lm_head", *keep)
    assert ability.kind is both.kind is ScoreKind.ATTRIBUTION
    assert both.num_tokens == ability.num_tokens
    assert both["lm_head"].sum() < ability["lm_head"].sum()  # German is lost on the way to the donor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --dataset"),
        (["--score", "attribution"], "the following arguments are required: --dataset"),
        (["--score", "weight", "--dataset", "x"], "--dataset: not used with --score weight"),
        (["--score", "weight", "--keep-dataset", "x"], "--keep-dataset: not used with --score weight"),
        (["--dataset", "x", "--keep-dataset", "x"], "--keep-dataset: not used with --score activation"),
        (["--dataset", "x", "--score", "loss"], "invalid choice: 'loss'"),
    ],
)
def test_bad_arguments(arguments, message, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["localize", "--base", "x", "--donor", "y", "--output", str(folder / "z"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
