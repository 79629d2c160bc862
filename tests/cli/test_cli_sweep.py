"""`act-peft sweep` on the shipped base and donor."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft import ChannelScores, localize, sweep
from act_peft.cli import build_parser, main
from act_peft.cli.next_steps import _reading
from act_peft.demo.family import BASE, DONOR, encode
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from act_peft.sweeps.choice import lowest_loss
from act_peft.sweeps.heldout import HeldOutData

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


FEW = ["--scales", "0.3", "--densities", "0.3", "--device", "cpu"]
FEW_FITS = ["--keep-weights", "1"]


def compare(folder, *arguments):
    data = ["--dataset", f"{folder}/spanish.jsonl", "--keep-dataset", f"{folder}/german.jsonl"]
    return main(["sweep", "--base", str(BASE), "--donor", str(DONOR), *data, *FEW, *arguments])


def commands(printed):
    lines = printed.splitlines()
    return [shlex.split(line)[1:] for line in lines[lines.index("next:") + 1 :]]


def test_without_scores_fits_are_tried_on_half_of_the_examples(folder, capsys, tmp_path, monkeypatch):
    before = sorted(folder.iterdir())
    methods = ["--methods", "interpolation", "fitted", "fitted-rows"]
    assert compare(folder, "--max-keep-loss", "0.5", *FEW_FITS, *methods) == 0
    printed = capsys.readouterr().out
    assert "by more than 0.5 nats per token" in printed
    assert {"interpolation", "fitted", "fitted-rows"} <= {line.split(" ")[0] for line in printed.splitlines()}
    assert "donor" in printed
    assert sorted(folder.iterdir()) == before
    monkeypatch.chdir(tmp_path)
    for command in commands(printed):
        assert main(command) == 0
    assert any((tmp_path / "ability").glob("*.safetensors"))


@pytest.mark.parametrize("method", ["fitted", "fitted-rows", "fitted-rank", "interpolation", "channels"])
def test_the_commands_that_are_printed_make_what_was_measured(folder, capsys, tmp_path, monkeypatch, method):
    """With examples of their own to fit on, so that the commands see the same ones."""
    for language in ("spanish", "german"):
        with open(tmp_path / f"fit-{language}.jsonl", "w") as file:
            for row in rows(Language[language.upper()], Split.TRAIN, count=EXAMPLES):
                file.write(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    needed = {"fitted-rows": ["fitted"], "fitted-rank": ["fitted"]}.get(method, [])
    # Of the methods that are compared, only the one in question counts.
    monkeypatch.setattr(
        "act_peft.sweeps.result.recommend_by_loss",
        lambda rows, base, **_: lowest_loss(row for row in rows if row.method.value == method),
    )
    given = ["--methods", method, *needed, "--max-keep-loss", "9", "--output", "sweep.json"]
    if method.startswith("fitted"):
        given += [*FEW_FITS, "--fit-dataset", "fit-spanish.jsonl", "--fit-keep-dataset", "fit-german.jsonl"]
    if method == "channels":
        given += ["--scores", str(folder / "scores")]
    assert compare(folder, *given) == 0
    numbers = json.loads((tmp_path / "sweep.json").read_text())
    (best,) = (row for row in numbers["rows"] if row["recommended"])
    made = commands(capsys.readouterr().out)
    for command in made:
        assert main(command) == 0
    if method in ("fitted", "interpolation"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ability")
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(tmp_path / "ability"))
    found = HeldOutData([batch_of(Language.SPANISH)], argument="").measure(model.eval())
    assert best["method"] == method
    assert found.loss == pytest.approx(best["ability"]["loss"], rel=1e-3)


def test_the_fit_reads_its_examples_in_the_same_way():
    models = ["--base", "b", "--donor", "d", "--dataset", "a", "--keep-dataset", "k"]
    usual = build_parser().parse_args(["fit", *models, "--output", "o"])
    assert _reading(usual) == []
    given = ["--samples", "9", "--seed", "3", "--max-length", "32", "--assistant-only"]
    arguments = build_parser().parse_args(["sweep", *models, *given])
    assert _reading(arguments) == ["--samples", "9", "--max-length", "32", "--seed", "3", "--assistant-only"]


def test_rules_of_weights_are_said_in_python(folder, capsys):
    assert compare(folder, "--methods", "layer-swap", "--max-keep-loss", "9") == 0
    assert "parameter += LayerSwap(first=" in capsys.readouterr().out


def test_nothing_to_take(folder, capsys):
    given = ["--methods", "interpolation", "--max-keep-loss", "0"]
    assert compare(folder, *given) == 0
    printed = capsys.readouterr().out
    assert re.search(r"recommended: none of \d+ settings", printed)
    assert "next: nothing is worth taking within this limit\n  allow more with --max-keep-loss" in printed


def test_scores_and_fits_and_a_figure(folder, capsys, tmp_path):
    given = [
        "--scores",
        str(folder / "scores"),
        "--fit",
        "--ranks",
        "4",
        "--figure",
        str(tmp_path / "sweep.png"),
        "--json",
    ]
    assert compare(folder, *given) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["max_keep_loss"] == 0.03
    methods = {row["method"] for row in printed["rows"]}
    assert {"channels", "interpolation", "ties", "dare", "lines", "layer-swap", "fitted", "fitted-rank"} <= methods
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_too_few_examples_to_halve(folder, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text(json.dumps(rows(Language.SPANISH, Split.TRAIN, count=1)[0]) + "\n")
    assert compare(folder, "--dataset", str(tmp_path / "few.jsonl")) == 1
    assert "dataset: got 1 examples, expected at least 4, half of which are held out" in capsys.readouterr().err


def test_examples_to_fit_on_come_together(folder, capsys):
    with pytest.raises(SystemExit):
        compare(folder, "--fit-dataset", f"{folder}/english.jsonl")
    assert "argument --fit-dataset: expected together with --fit-keep-dataset" in capsys.readouterr().err
