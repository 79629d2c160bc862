"""`act-peft localize` with an adapter as donor and with every kind of score, on the shipped base and donor."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import ChannelScores, localize
from act_peft.channels.scores import ScoreKind
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from act_peft.transfer.donors import is_adapter

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
    assert "lm_head" not in scores


def test_a_whole_model_with_an_adapter_beside_it_is_a_model(folder):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    both = folder / "both"
    model.save_pretrained(both)
    PeftModel.from_pretrained(model, folder / "lora").save_pretrained(both)
    assert not is_adapter(str(both))


def test_what_is_left_out_is_said(folder, capsys):
    weights = ["--score", "weight"]
    said = r"left out: model.embed_tokens, lm_head \(name them in --target-modules to score them\)\n\Z"
    scores_of(folder, *weights, ability=False)
    assert re.search(said, capsys.readouterr().out)
    scores_of(folder, *weights, "--exclude-modules", "embed_tokens", ability=False)
    assert "left out: lm_head (" in capsys.readouterr().out
    named = scores_of(folder, *weights, "--target-modules", "lm_head", "embed_tokens", ability=False)
    assert list(named) == ["model.embed_tokens", "lm_head"]
    every = scores_of(folder, *weights, "--target-modules", ".*", "--exclude-modules", ".*norm", ability=False)
    assert set(named) < set(every)
    assert not any(name.endswith("norm") for name in every)
    assert "left out" not in capsys.readouterr().out


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


def test_contrast_with_a_skill_to_keep(folder):
    keep = ["--keep-dataset", str(folder / f"{Language.GERMAN.value}.jsonl")]
    scores = scores_of(folder, "--score", "contrast", *keep)
    assert scores.kind is ScoreKind.CONTRAST
    assert scores.keep.num_tokens > 0
    ability = scores_of(folder)
    assert scores.num_tokens == ability.num_tokens
    assert list(scores) == list(ability)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --dataset"),
        (["--score", "contrast", "--dataset", "x"], "are required with --score contrast: --keep-dataset"),
        (["--dataset", "x", "--target-modules", "("], "--target-modules: '(' is no regular expression (missing ),"),
        (["--dataset", "x", "--exclude-modules", "*"], "--exclude-modules: '*' is no regular expression (nothing to"),
        (["--score", "attribution"], "the following arguments are required: --dataset"),
        (["--score", "weight", "--dataset", "x"], "--dataset: not used with --score weight"),
        (["--score", "weight", "--keep-dataset", "x"], "--keep-dataset: not used with --score weight"),
        (["--dataset", "x", "--keep-dataset", "x"], "--keep-dataset: not used with --score activation"),
        (["--dataset", "x", "--score", "loss"], "invalid choice: 'loss'"),
        (["--dataset", "x", "--samples", "0"], "argument --samples: got 0, expected an integer from 1 on"),
        (["--dataset", "x", "--samples", "few"], "argument --samples: invalid integer value: 'few'"),
        (["--dataset", "x", "--batch-size", "0"], "argument --batch-size: got 0, expected an integer from 1 on"),
        (["--dataset", "x", "--max-length", "0"], "argument --max-length: got 0, expected an integer from 1 on"),
        (["--dataset", "x", "--seed", "-1"], "argument --seed: got -1, expected an integer from 0 on"),
        (["--dataset", "x", "--dtype", "float33"], "argument --dtype: invalid choice: 'float33'"),
    ],
)
def test_bad_arguments(arguments, message, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["localize", "--base", "x", "--donor", "y", "--output", str(folder / "z"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def refused(folder, capsys, *arguments):
    """What the last line on the error stream says; datasets and transformers may have said something before."""
    command = ["localize", "--base", str(BASE), "--donor", str(DONOR), "--device", "cpu", "--output", f"{folder}/new"]
    assert main([*command, *arguments]) == 1
    assert not (folder / "new").exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got no examples, expected at least one (in split 'train')"),
        ("hello there", "cannot be loaded, expected a JSON or JSONL file"),
        ("1\n2\n", "cannot be loaded, expected a JSON or JSONL file"),
        ("[]", "cannot be loaded, expected a JSON or JSONL file"),
        ('{"foo": 1}\n{"foo": 2}\n', "got the columns ['foo'], expected those of one of TRL's formats: 'prompt' and"),
        ('{"prompt": "a", "text": "b"}', "got the columns ['prompt', 'text'], expected those of one of TRL's formats"),
        (
            '{"prompt": "a", "completion": null}',
            "got 1 examples without an answer, expected at least one",
        ),
        ('{"text": 1}', "with the columns ['text']: TRL cannot tokenize it, expected examples"),
    ],
)
def test_bad_datasets_are_one_line(tmp_path, capsys, text, message):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    line = refused(tmp_path, capsys, "--dataset", str(data))
    assert message in line
    assert str(data) in line or "dataset with the columns" in line


@pytest.mark.parametrize("name", ["nosuch.jsonl", "data/nosuch.json", "{}/nosuch", "./nosuch", "../nosuch/x"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(folder, capsys, name):
    name = name.format(folder)
    line = refused(folder, capsys, "--dataset", name)
    assert f"dataset '{name}': there is no such file or folder, expected a JSON or JSONL file" in line
    assert line.endswith("(check the path)")


def test_a_name_that_is_on_no_disk_and_not_on_the_hub(folder, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    line = refused(folder, capsys, "--dataset", "data/nosuch")
    assert "'data/nosuch': there is no such file or folder, nor can it be loaded, expected a JSON or JSONL" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "device: got 'cuda:99', expected one that torch can use here"),
        (["--device", "toaster"], "device: got 'toaster', expected one that torch can use here"),
        (["--device", "meta"], "device: got 'meta', expected one that torch can use here"),
        (["--split", "test"], "cannot be loaded, expected a JSON or JSONL file, a folder or a Hub id (Unknown split"),
        (["--assistant-only"], "'completion'] and --assistant-only, expected conversations in a column 'messages'"),
        (["--exclude-modules", "v_porj"], "--exclude-modules: 'v_porj': no module with channels has such a name"),
        (["--target-modules", "q.*porj"], "--target-modules: 'q.*porj': no module with channels has such a name"),
        (["--base", "{}"], "cannot be loaded, expected the folder or Hub id of a causal language model"),
        (["--base", "{}/merged"], "merged: its tokenizer cannot be loaded, expected one in the folder of the model"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(folder, capsys, arguments, message):
    data = ["--dataset", str(folder / f"{Language.SPANISH.value}.jsonl")]
    line = refused(folder, capsys, *data, *(argument.format(folder) for argument in arguments))
    assert line.startswith("act-peft: ")
    assert message in line


class TestByColumn:
    @pytest.fixture
    def mixed(self, folder):
        """Examples of two languages in one file, and the same in files of their own."""
        path = folder / "mixed.jsonl"
        with open(path, "w") as file:
            found = (rows(language, Split.TRAIN, count=8) for language in (Language.SPANISH, Language.GERMAN))
            for one, other in zip(*found, strict=True):
                for row, lang in ((one, "es"), (other, "de")):
                    file.write(json.dumps({**row, "lang": lang}) + "\n")
        return path

    def run(self, folder, dataset, *arguments):
        output = folder / "by.safetensors"
        models = ["--base", str(BASE), "--donor", str(DONOR), "--dataset", str(dataset), "--device", "cpu"]
        return main(["localize", *models, "--by", "lang", "--output", str(output), *arguments])

    def test_one_file_for_each_value(self, folder, mixed, capsys):
        assert self.run(folder, mixed) == 0
        said = capsys.readouterr().out
        for language in (Language.SPANISH, Language.GERMAN):
            path = folder / f"by.{language.value}.safetensors"
            assert f"{path}: scores of" in said
            alone = folder / f"{language.value}.jsonl"
            models = ["--base", str(BASE), "--donor", str(DONOR), "--dataset", str(alone), "--device", "cpu"]
            assert main(["localize", *models, "--output", str(folder / "alone"), "--overwrite"]) == 0
            found, expected = ChannelScores.load(path), ChannelScores.load(folder / "alone")
            assert found.num_samples == expected.num_samples == 8
            assert_close(found, expected)
        assert self.run(folder, mixed) == 1  # the outputs exist
        assert "exists, expected a new file" in capsys.readouterr().err
        assert self.run(folder, mixed, "--samples", "3", "--overwrite") == 0
        assert ChannelScores.load(folder / "by.es.safetensors").num_samples == 3

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (["es", "../x"], r"column 'lang': got '../x' in row 1, expected values that can be part of the name of a"),
            (["es", None], r"column 'lang': got None in row 1, expected values"),
            ([f"v{n}" for n in range(201)], r"column 'lang': got 201 different values, expected at most 200"),
        ],
    )
    def test_values_that_are_no_names(self, folder, tmp_path, capsys, values, message):
        example = rows(Language.SPANISH, Split.TRAIN, count=1)[0]
        lines = [json.dumps({**example, "lang": value}) for value in values]
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        assert self.run(tmp_path, tmp_path / "x.jsonl") == 1
        assert re.search(message, capsys.readouterr().err)
        assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]

    def test_no_such_column(self, folder, capsys):
        assert self.run(folder, folder / f"{Language.SPANISH.value}.jsonl") == 1
        assert re.search(r"column 'lang': there is none, expected one of prompt, completion", capsys.readouterr().err)

    def test_not_with_weights(self, capsys):
        with pytest.raises(SystemExit):
            main(["localize", "--base", "b", "--donor", "d", "--score", "weight", "--by", "x", "--output", "o"])
        assert "argument --by: not used with --score weight" in capsys.readouterr().err
