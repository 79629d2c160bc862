"""`act-peft fit` and what is made of its file, on the shipped base and donor."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from act_peft import ChannelMask, FittedTransfer
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
IDS = torch.arange(4, 30)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with examples of two skills, a fitted transfer and a mask of its gains."""
    path = tmp_path_factory.mktemp("fit")
    for language in (Language.SPANISH, Language.GERMAN):
        with open(path / f"{language.value}.jsonl", "w") as file:
            for row in rows(language, Split.TRAIN, count=12):
                file.write(json.dumps(row) + "\n")
    assert main([*command(path), "--output", str(path / "fitted")]) == 0
    select = ["select", str(path / "fitted"), "--density", "0.2", "--scope", "module"]
    assert main([*select, "--output", str(path / "mask")]) == 0
    return path


def command(path, *, dataset=1, donors=1):
    data = str(path / f"{Language.SPANISH.value}.jsonl")
    return [
        *["fit", "--base", str(BASE), "--donor", *[str(DONOR)] * donors, "--dataset", *[data] * dataset],
        *["--keep-dataset", str(path / f"{Language.GERMAN.value}.jsonl"), "--device", "cpu", "--max-rank", "16"],
    ]


def transfer(folder, name, *arguments):
    output = folder / name
    assert main(["transfer", "--fitted", str(folder / "fitted"), "--output", str(output), *arguments]) == 0
    return output


def test_the_file_holds_a_fit(folder, capsys):
    fitted = FittedTransfer.load(folder / "fitted")
    assert fitted.record.base == str(BASE)
    assert fitted.record.donors == (str(DONOR),)
    assert min(fitted.record.num_tokens) > 12
    assert dict(fitted.record.settings.__dict__) == {"keep_weight": 1.0, "ridge": 0.03, "prior_scale": 0.0}
    assert ChannelMask.load(folder / "mask") == fitted.gains.top(0.2, scope="module")
    assert main(["inspect", str(folder / "fitted"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == "fitted transfer"
    assert list(summary["modules"]) == list(fitted.modules)


def test_an_adapter_of_the_mask(folder, capsys):
    output = transfer(folder, "ability", "--mask", str(folder / "mask"), "--tokens", "0.3")
    assert "adapter, " in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(output))
    assert not torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(BASE)(IDS).logits)


def test_a_lora_adapter(folder, capsys):
    output = transfer(folder, "lora", "--rank", "4", "--norms", "--base", str(BASE))
    assert "LoRA adapter of rank 4, which loses " in capsys.readouterr().out
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(output))


def test_a_merged_checkpoint(folder):
    output = transfer(folder, "merged", "--base", str(BASE))
    expected = AutoModelForCausalLM.from_pretrained(BASE)
    FittedTransfer.load(folder / "fitted").add_to_(expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(IDS).logits, expected(IDS).logits)


def test_several_donors(folder):
    arguments = [*command(folder, donors=2, dataset=2), "--target-modules", "q_proj", "--positions", "answer"]
    assert main([*arguments, "--output", str(folder / "two")]) == 0
    assert len(FittedTransfer.load(folder / "two").record.donors) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--donor", "x"], "argument --donor: not used with --fitted"),
        (["--transfer-scale", "1"], "argument --transfer-scale: not used with --fitted"),
        (["--mask", "m", "--rank", "3"], "argument --rank: not used with --mask"),
        (["--mask", "m", "--norms"], "argument --norms: not used with --mask"),
        (["--tokens", "1"], "argument --tokens: not used for a merged checkpoint"),
        ([], "a merged checkpoint needs --base"),
    ],
)
def test_arguments_that_would_not_be_used(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["transfer", "--fitted", str(folder / "fitted"), "--output", str(folder / "none"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "3"], "argument --rank: only used with --fitted"),
        (["--base", "b"], "the following arguments are required: --donor, --mask"),
    ],
)
def test_arguments_without_a_fit(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["transfer", "--output", str(tmp_path / "none"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_as_many_datasets_as_donors(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command(folder, donors=2), "--output", str(folder / "none")])
    assert ended.value.code == 2
    assert "argument --dataset: got 1 for 2 donors, expected as many" in capsys.readouterr().err


def test_a_rank_that_was_not_kept(folder, capsys):
    arguments = ["transfer", "--fitted", str(folder / "fitted"), "--output", str(folder / "none"), "--rank", "17"]
    assert main(arguments) == 1
    assert "the fit kept 16 directions" in capsys.readouterr().err
