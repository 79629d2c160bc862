from __future__ import annotations

import json
import shutil

import pytest
import torch

from act_peft import ActValueError
from act_peft.disk import tensorfile
from act_peft.report.contents import read_content, short_names


def test_every_kind(shown):
    kinds = {
        "scores.safetensors": "scores",
        "mask.safetensors": "mask",
        "adapter": "adapter",
        "sweep.json": "sweep",
        "losses.json": "sweep",
        "patching.json": "patching",
    }
    assert {name: read_content(shown / name).kind for name in kinds} == kinds
    adapter = read_content(shown / "adapter")
    assert adapter.scales
    assert all(values.tolist() == [0.0, pytest.approx(0.4), 1.0] for values in adapter.scales.values())
    assert all(index.tolist() == [0, 3, 5] for index in adapter.mask.values())
    assert adapter.facts["trainable"] == "scales"
    scores = read_content(shown / "scores.safetensors")
    assert scores.facts["num samples"] == "12"


def test_a_sweep_is_what_it_was(shown):
    for name in ("sweep.json", "losses.json"):
        given = json.loads((shown / name).read_text())
        found = read_content(shown / name).sweep.to_dict()
        for row in (found, given):
            for part in row["rows"]:
                part.pop("against_base")
                for skill in (part["ability"], *part["keep"].values()):
                    skill.pop("num_tokens", None), skill.pop("loss_error", None), skill.pop("accuracy_error", None)
        assert found["rows"] == given["rows"]
        assert found["recommended"] == given["recommended"]
        assert found["rule"] == given["rule"]


def test_unknown_metadata_is_shown_and_long_ones_are_cut(tmp_path):
    metadata = {"modules": [["m", 3]], "origin": {"base": "org/base", "data": "x" * 400}, "nothing": None}
    tensorfile.write(tmp_path / "mask", "channel mask", 1, {"m": torch.tensor([1])}, metadata)
    facts = read_content(tmp_path / "mask").facts
    assert facts["origin: base"] == "org/base"
    assert facts["origin: data"] == "x" * 300 + " ..."
    assert "nothing" not in facts


def test_short_names():
    assert short_names(["a/x.safetensors", "b/y", "c/z.json"]) == ["x", "y", "z.json"]
    assert short_names(["a/x.safetensors", "b/x.safetensors"]) == ["a/x.safetensors", "b/x.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "got list, expected the JSON of a sweep or of patching"),
        ("{}", "sweep: 'rows' is missing"),
        ('{"kind": "patching"}', "patching: 'rows' is missing"),
        ('{"rows": 3}', "sweep: rows: got int, expected a list"),
    ],
)
def test_json_of_something_else(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ActValueError, match=rf"x\.json: {message}"):
        read_content(tmp_path / "x.json")


SWEEP_CHANGES = [
    (lambda s: s.update(base=3), "row: got int, expected an object"),
    (lambda s: s["rows"][0].update(settings=[]), "settings: got list, expected an object"),
    (lambda s: s["rows"][0].update(density="1"), "density: got '1'"),
    (lambda s: s["rows"][0].update(method="magic"), "method: got 'magic', expected one of"),
    (lambda s: s["rows"][0]["ability"].update(accuracy=float("nan")), "accuracy: got nan"),
    (lambda s: s["rows"][0]["keep"].clear(), "keep: got no skill"),
    (lambda s: s["rows"][0]["keep"].update(other=s["base"]["ability"]), "rows: got different skills to keep"),
    (lambda s: s.update(scope="all"), "scope: got 'all'"),
    (lambda s: s.pop("donor"), "'donor' is missing"),
]


@pytest.mark.parametrize(("change", "message"), SWEEP_CHANGES)
def test_damaged_sweeps(shown, tmp_path, change, message):
    sweep = json.loads((shown / "sweep.json").read_text())
    change(sweep)
    (tmp_path / "x.json").write_text(json.dumps(sweep))
    with pytest.raises(ActValueError, match=message):
        read_content(tmp_path / "x.json")


def test_folders_and_missing_files(shown, tmp_path):
    with pytest.raises(ActValueError, match=r"got a folder without adapter_config.json, expected an ACT adapter"):
        read_content(tmp_path)
    with pytest.raises(ActValueError, match="no such file, expected the JSON of a sweep"):
        read_content(tmp_path / "x.json")
    shutil.copytree(shown / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    good = config.read_text()
    values = json.loads(good)
    next(iter(values["adapted_modules"].values())).pop("channels")
    config.write_text(json.dumps(values))
    with pytest.raises(ActValueError, match="adapted_modules does not say how many channels it has"):
        read_content(tmp_path / "adapter")
    values = json.loads(good)
    next(iter(values["adapted_modules"].values()))["channels"] = 2
    config.write_text(json.dumps(values))
    with pytest.raises(ActValueError, match=r"got channel 5, expected 0 to 1.*the adapter is damaged"):
        read_content(tmp_path / "adapter")


def test_a_huge_json_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ActValueError, match="got 67108865 bytes, expected the JSON"):
        read_content(tmp_path / "x.json")
