"""`act-peft sweep` on the shipped base and donor."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft import ChannelScores, localize, sweep
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR, encode
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
EXAMPLES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with held-out examples of three languages, and scores."""
    path = tmp_path_factory.mktemp("sweep")
    for language in Language:
        with open(path / f"{language.name.lower()}.jsonl", "w") as file:
            for row in rows(language, Split.VALIDATION, count=EXAMPLES):
                file.write(json.dumps(row) + "\n")
    base, donor = (AutoModelForCausalLM.from_pretrained(name) for name in (BASE, DONOR))
    localize(base, donor, [batch_of(Language.SPANISH)], exclude_modules=["embed_tokens"]).save(path / "scores")
    return path


def batch_of(language):
    ids, labels = encode(AutoTokenizer.from_pretrained(BASE), rows(language, Split.VALIDATION, count=EXAMPLES))
    return {"input_ids": ids, "labels": labels}


def command(folder, *arguments, output="sweep.json"):
    data = ["--dataset", f"{folder}/spanish.jsonl", "--keep-dataset", f"{folder}/german.jsonl"]
    paths = ["--base", str(BASE), "--donor", str(DONOR), "--scores", str(folder / "scores")]
    grid = ["--densities", "0.1", "0.3", "--scales", "0.5", "--device", "cpu"]
    return ["sweep", *paths, *data, *grid, "--output", str(folder / output), *arguments]


def test_numbers_are_those_of_the_library(folder, capsys):
    assert main(command(folder, "--scope", "module", "--max-drop", "0.2", "--overwrite")) == 0
    printed = capsys.readouterr().out
    base, donor = (AutoModelForCausalLM.from_pretrained(name) for name in (BASE, DONOR))
    expected = sweep(
        base,
        donor,
        ChannelScores.load(folder / "scores"),
        [batch_of(Language.SPANISH)],
        {"german": [batch_of(Language.GERMAN)]},
        densities=[0.1, 0.3],
        scales=[0.5],
        scope="module",
        max_drop=0.2,
    ).to_dict()
    got = json.loads((folder / "sweep.json").read_text())
    assert (got["scope"], got["max_drop"], got["donor"]) == ("module", 0.2, None)
    for one, other in zip([got["base"], *got["rows"]], [expected["base"], *expected["rows"]], strict=True):
        assert one["num_channels"] == other["num_channels"]
        for mine, theirs in ((one["ability"], other["ability"]), (one["keep"]["german"], other["keep"]["german"])):
            assert mine["accuracy"] == theirs["accuracy"]
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert got["recommended"] == expected["recommended"]
    assert f"recommended: density {got['recommended']['density']:g}, scale 0.5 (the highest" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "english.jsonl", "german.jsonl", "scores", "spanish.jsonl", "sweep.json"
    ]  # fmt: skip


def test_json_donor_two_skills_and_a_figure(folder, capsys):
    skills = ["--keep-dataset", f"{folder}/german.jsonl", f"{folder}/english.jsonl"]
    figure = ["--figure", str(folder / "sweep.png")]
    assert main(command(folder, "--json", "--measure-donor", *skills, *figure, output="other.json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "other.json").read_text())
    assert list(printed["base"]["keep"]) == ["german", "english"]
    assert printed["donor"]["ability"]["accuracy"] > printed["base"]["ability"]["accuracy"]
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    (folder / "sweep.png").unlink()
    (folder / "other.json").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-dataset", "{}/german.jsonl", "{}/german.jsonl"], "got german, german, expected different names"),
        (["--scope", "layer"], "invalid choice: 'layer'"),
        (["--densities", "many"], "invalid float value: 'many'"),
        (["--samples", "0"], "argument --samples: got 0, expected an integer from 1 on"),
        (["--dtype", "float33"], "argument --dtype: invalid choice: 'float33'"),
    ],
)
def test_bad_arguments(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(command(folder, *(argument.format(folder) for argument in arguments), output="new.json"))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "{}/scores"], "scores: exists, expected a new file"),
        (["--figure", "{}/no/x.png"], "does not exist, expected an existing one"),
        (["--scores", "{}/nothing"], "nothing: no such file"),
        (["--densities", "0"], "densities: got 0.0, expected a number above 0 and at most 1"),
        (["--keep-dataset", "{}/nothing"], "nothing': there is no such file or folder"),
        (["--dataset", "{}/scores"], "scores': cannot be loaded"),
        (["--device", "cuda:99"], "device: got 'cuda:99', expected one that torch can use here"),
    ],
)
def test_failures_write_nothing(folder, capsys, arguments, message):
    before = sorted(folder.iterdir())
    assert main(command(folder, *(argument.format(folder) for argument in arguments), output="new.json")) == 1
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before
