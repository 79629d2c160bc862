"""`act-peft patch`, `plot`, `report`, `diff` and `inspect`, on the shipped base and donor."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
MODELS = ["--base", str(BASE), "--donor", str(DONOR), "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with examples, scores and a mask of every kind of module."""
    path = tmp_path_factory.mktemp("analysis")
    for name, split in (("train", Split.TRAIN), ("test", Split.TEST)):
        with open(path / f"{name}.jsonl", "w") as file:
            for row in rows(Language.SPANISH, split, count=8):
                file.write(json.dumps(row) + "\n")
    scores = path / "scores.safetensors"
    assert main(["localize", *MODELS, "--dataset", str(path / "train.jsonl"), "--output", str(scores)]) == 0
    ChannelScores.load(scores).top(0.2, scope="module").save(path / "mask.safetensors")
    return path


def test_patch(folder, tmp_path, capsys):
    command = [
        "patch",
        *MODELS,
        "--dataset",
        str(folder / "test.jsonl"),
        "--scores",
        str(folder / "scores.safetensors"),
    ]
    outputs = ["--output", str(tmp_path / "patching.json"), "--figure", str(tmp_path / "figure.svg")]
    assert main([*command, "--densities", "0.1", "0.5", *outputs]) == 0
    said = capsys.readouterr().out
    assert "of the loss gap" in said
    assert "sufficiency" in said
    found = json.loads((tmp_path / "patching.json").read_text())
    assert [(row["name"], row["channels"]) for row in found["rows"]] == [
        ("0.1", "selected"),
        ("0.1", "random"),
        ("0.5", "selected"),
        ("0.5", "random"),
    ]
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert main(["plot", str(tmp_path / "patching.json"), "--output", str(tmp_path / "again.png")]) == 0
    assert "again.png: The donor's activations" in capsys.readouterr().out


def test_patch_of_masks(folder, capsys):
    mask = str(folder / "mask.safetensors")
    command = ["patch", *MODELS, "--dataset", str(folder / "test.jsonl"), "--mask", mask, "--random-draws", "0"]
    assert main([*command, "--json", "--positions", "all"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == [mask]
    assert found["positions"] == "all"
    with pytest.raises(SystemExit):
        main([*command, "--densities", "0.1"])
    assert "argument --densities: not used with --mask" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "arguments", "title"),
    [
        (["scores.safetensors"], [], "The top 5% of every module's channels hold"),
        (["scores.safetensors"], ["--what", "concentration", "--density", "0.1"], "The best 10% of the channels"),
        (["scores.safetensors"], ["--what", "composition"], "No kind of module dominates"),
        (["scores.safetensors"], ["--what", "samples"], "samples"),
        (["mask.safetensors"], [], "No kind of module dominates"),
        (["scores.safetensors", "scores.safetensors"], ["--note", "x"], "masks of 5% by"),
        (["mask.safetensors", "copy.safetensors"], [], "2 masks overlap by 100%"),
    ],
)
def test_plot(folder, tmp_path, capsys, files, arguments, title):
    ChannelMask.load(folder / "mask.safetensors").save(folder / "copy.safetensors")
    if len(set(files)) < len(files):  # the same name in two folders
        ChannelScores.load(folder / files[0]).save(tmp_path / files[0])
        paths = [str(folder / files[0]), str(tmp_path / files[1])]
    else:
        paths = [str(folder / name) for name in files]
    assert main(["plot", *paths, "--output", str(tmp_path / "figure.png"), *arguments]) == 0
    assert title.lower() in capsys.readouterr().out.lower()
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_what_is_not_there(folder, tmp_path, capsys):
    output = ["--output", str(tmp_path / "figure.png")]
    mask, scores = str(folder / "mask.safetensors"), str(folder / "scores.safetensors")
    assert main(["plot", mask, "--what", "sweep", *output]) == 1
    assert "what: got 'sweep', expected one of composition for" in capsys.readouterr().err
    assert main(["plot", mask, scores, *output]) == 1
    assert "files: got several of different kinds" in capsys.readouterr().err
    assert main(["plot", mask, "--output", str(tmp_path / "figure.gif")]) == 1
    assert "got a name that ends in '.gif', expected .png, .svg, .pdf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report(folder, tmp_path, capsys):
    files = [str(folder / name) for name in ("scores.safetensors", "mask.safetensors")]
    assert main(["report", *files, "--output", str(tmp_path / "report.html"), "--title", "Spanish"]) == 0
    assert "report.html: report on 2 files, " in capsys.readouterr().out
    assert "<h1>Spanish</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", *files, "--output", str(tmp_path / "report.html")]) == 1
    assert "exists, expected a new file" in capsys.readouterr().err


def test_pictures_of_scores_and_masks_need_no_models(folder, tmp_path):
    """transformers and PEFT take seconds and hundreds of megabytes."""
    files = [str(folder / name) for name in ("scores.safetensors", "mask.safetensors")]
    code = (
        "import sys; sys.orig_argv = sys.argv = ['/bin/act-peft']; from act_peft.cli import main; "
        f"assert main(['report', *{files!r}, '--output', {str(tmp_path / 'report.html')!r}]) == 0; "
        "print(sorted({'transformers', 'peft', 'trl', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_diff(capsys):
    assert main(["diff", str(BASE), str(DONOR)]) == 0
    said = capsys.readouterr().out
    assert "they look like relatives (cosine of the weights" in said
    assert "relative size" in said
    assert main(["diff", str(BASE), str(BASE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"].endswith("it is the same model")


def test_diff_of_an_adapter(tmp_path, capsys):
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=1)).save_pretrained(tmp_path)
    assert main(["diff", str(BASE), str(tmp_path)]) == 1
    assert "got an adapter, expected a checkpoint" in capsys.readouterr().err


def test_inspect_says_kinds_first(folder, capsys):
    assert main(["inspect", str(folder / "mask.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith("modules by kind:")
    kinds = [line.split() for line in lines[5:-1]]
    mask = ChannelMask.load(folder / "mask.safetensors")
    for kind, modules, selected, channels, density in kinds:
        names = [name for name in mask if name.rpartition(".")[2] == kind]
        assert int(modules) == len(names)
        assert int(selected) == sum(mask[name].numel() for name in names)
        assert int(channels) == sum(mask.num_channels[name] for name in names)
        assert float(density) == pytest.approx(int(selected) / int(channels), rel=1e-3)
    assert lines[-1] == "(--all lists every module)"
    assert main(["inspect", str(folder / "scores.safetensors"), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    every = [line.split() for line in lines[lines.index("every module:") + 2 :]]
    largest = [float(line[-1]) for line in every]
    assert largest == sorted(largest, reverse=True)
    assert len(every) == len(mask)
