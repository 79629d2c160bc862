"""ActConfig: what it accepts, what it refuses, and what it writes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from peft import PeftConfig, get_peft_config, get_peft_model
from peft.utils import PeftType
from safetensors.torch import load_file

from act_peft import ActConfig, ActTypeError, ActValueError, ActWarning, ChannelMask, ChannelScores
from tests.support.tiny_models import build

MASK = ChannelMask({"lin": [2, 0]}, {"lin": 3, "out": 5})


def test_a_configuration_without_channels_can_be_constructed():
    config = ActConfig()
    assert config.peft_type is PeftType("ACT")
    assert (config.channels, config.transfer_scale, config.trainable, config.init_weights) == (
        None,
        0.4,
        "deltas",
        True,
    )


@pytest.mark.parametrize("channels", [[2, 0], (2, 0), {0, 2}, range(0, 4, 2), torch.tensor([2, 0])])
def test_channels_of_any_kind_become_sorted_lists(channels):
    assert ActConfig(channels={"lin": channels}).channels == {"lin": [0, 2]}


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"channels": 3}, ActTypeError, "channels: got int, expected a ChannelMask, a dict of lists or a path"),
        ({"channels": {"lin": [-1]}}, ActValueError, r"channels\['lin'\]: got channel -1, expected 0 or more"),
        ({"channels": {"lin": [1, 1]}}, ActValueError, r"channels\['lin'\]: got channel 1 more than once"),
        ({"channels": {"lin": [0.5]}}, ActTypeError, "float32, expected integer indices"),
        ({"channels": {"lin": [True]}}, ActTypeError, "bool, expected integer indices"),
        ({"channels": {"lin": "12"}}, ActTypeError, "expected a flat collection of ints"),
        ({"channels": {"lin": 3}}, ActTypeError, "expected a flat collection of ints"),
        ({"transfer_scale": float("nan")}, ActValueError, "transfer_scale: got nan, expected a finite number"),
        ({"transfer_scale": float("inf")}, ActValueError, "transfer_scale: got inf"),
        ({"transfer_scale": "much"}, ActTypeError, "transfer_scale: got 'much'"),
        ({"transfer_scale": True}, ActTypeError, "transfer_scale: got True"),
        ({"trainable": "all"}, ActValueError, "trainable: got 'all', expected one of 'deltas'"),
        ({"trainable": "rows"}, ActValueError, "trainable: got 'rows', expected one of 'deltas', 'scales', 'both'"),
        ({"donor_revision": "main"}, ActValueError, "donor_revision: given without a donor"),
        ({"target_modules": "lin", "layers_to_transform": [0]}, ActValueError, "cannot be used when `target_modules`"),
        ({"layers_pattern": "layers"}, ActValueError, "`layers_to_transform` must also be specified"),
        ({"adapted_modules": {"lin": 3}}, ActValueError, "adapted_modules: got .*, expected module name"),
        ({"task_type": "POETRY"}, ValueError, "Invalid task type"),
    ],
)
def test_what_can_never_be_right_is_refused(settings, error, match):
    with pytest.raises(error, match=match):
        ActConfig(**settings)


def test_channels_are_not_written(tmp_path):
    config = ActConfig(channels=MASK, target_modules=["b", "a"], exclude_modules=["d", "c"], donor="org/donor")
    assert config.to_dict()["channels"] is None
    assert config.channels is MASK
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["channels"] is None
    assert (saved["target_modules"], saved["exclude_modules"]) == (["a", "b"], ["c", "d"])
    assert not (tmp_path / "README.md").exists()


def test_what_was_written_is_read_again_and_known_as_a_file(tmp_path):
    ActConfig(channels=MASK, donor="org/donor", transfer_scale=0.7, target_modules=["a"]).save_pretrained(tmp_path)
    for config in (ActConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(config, ActConfig)
        assert (config.donor, config.transfer_scale, config.target_modules) == ("org/donor", 0.7, {"a"})
        assert config.from_file
    assert not ActConfig(channels=MASK, donor="org/donor").from_file


@pytest.mark.parametrize("channels", [MASK, {"q_proj": [3, 17]}])
def test_replaced_fields_make_a_configuration_of_a_user_s(channels):
    config = dataclasses.replace(ActConfig(channels=channels, donor="org/donor"), transfer_scale=0.7)
    assert (config.transfer_scale, config.donor, config.from_file) == (0.7, "org/donor", False)


@pytest.mark.parametrize("channels", [{"q_proj": [3, 17]}, "mask.safetensors"])
def test_channels_in_what_looks_like_a_file_are_refused(channels):
    with pytest.raises(ActValueError, match=r"in a configuration from a file, expected none .*leave peft_type out"):
        get_peft_config({"peft_type": "ACT", "channels": channels, "donor": "org/donor"})


def test_a_donor_is_kept_as_text(tmp_path):
    ActConfig(channels=MASK, donor=tmp_path).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).donor == str(tmp_path)


@pytest.mark.parametrize("donor", [3, torch.nn.Linear(2, 2)])
def test_a_donor_in_memory_is_refused(donor):
    with pytest.raises(ActTypeError, match=rf"donor: got {type(donor).__name__}, .* call initialize_from_donor"):
        ActConfig(channels=MASK, donor=donor)


def test_scores_are_no_channels():
    with pytest.raises(ActTypeError, match=r"got ChannelScores, expected a ChannelMask \(scores.top\(density\)"):
        ActConfig(channels=ChannelScores({"q_proj": torch.ones(4)}, 3))


def test_copies_and_pickles_keep_everything():
    config = ActConfig(channels=MASK, donor="org/donor", task_type="CAUSAL_LM")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.channels == MASK
        assert other.from_file == config.from_file


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ActValueError, match="got a file, expected the adapter's folder"):
        ActConfig.from_pretrained(str(tmp_path / "file"))


def test_saving_leaves_a_whole_file_or_none(tmp_path, monkeypatch):
    ActConfig(channels=MASK, transfer_scale=0.5).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    monkeypatch.setattr("json.dumps", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        ActConfig(channels=MASK, transfer_scale=0.9).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ActValueError, match="got a file, expected a folder to save the adapter in"):
        ActConfig(channels=MASK).save_pretrained(str(tmp_path / "file"))


def test_pickled_tensors_are_worth_a_warning(tmp_path):
    ActConfig(channels=MASK).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.warns(ActWarning, match="the adapter is pickled"):
        ActConfig.from_pretrained(tmp_path)


def test_the_modules_that_follow_from_the_channels_are_named_but_not_written(tmp_path):
    config = ActConfig(channels={"up_proj": [1], "lm_head": [2]})
    model = get_peft_model(build("llama"), config)
    # PEFT would save the whole output layer if it found its name here.
    assert config.target_modules == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    assert config.chosen_targets is None
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] is None
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = get_peft_model(build("llama"), config)  # the same configuration for another model
    assert type(again.get_base_model().lm_head).__module__.startswith("act_peft")


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"target_modules": 3.5}, ActTypeError, "target_modules: got 3.5, expected a list of names"),
        ({"target_modules": "("}, ActValueError, r"target_modules: got '\(', expected names or a regular expression"),
        ({"exclude_modules": [3]}, ActTypeError, r"exclude_modules: got \[3\], expected a list of names"),
        ({"modules_to_save": [["x"]]}, ActTypeError, "modules_to_save: got .*, expected a list of names"),
        ({"layers_to_transform": "x"}, ActTypeError, "layers_to_transform: got 'x', expected an integer"),
        ({"layers_to_transform": [-1]}, ActValueError, "layers_to_transform: got -1, expected an integer"),
        (
            {"layers_pattern": ["["], "layers_to_transform": 1},
            ActValueError,
            "layers_pattern: got '\\[', expected names",
        ),
        ({"trainable_token_indices": {"x": 3}}, ActTypeError, "trainable_token_indices: got 3, expected a list of"),
        (
            {"trainable_token_indices": [10**400]},
            ActValueError,
            "trainable_token_indices: got 10000.*, expected an integer",
        ),
        ({"density": 3}, ActValueError, "density: got 3, expected a number from 0 to 1"),
        ({"revision": 3}, ActTypeError, "revision: got 3, expected text"),
        ({"inference_mode": "no"}, ActTypeError, "inference_mode: got 'no', expected True or False"),
        ({"transfer_scale": 10**5000}, ActValueError, "transfer_scale: got a int that is too long to write"),
    ],
)
def test_settings_of_other_types_are_refused(settings, error, match):
    with pytest.raises(error, match=match):
        ActConfig(channels={"q_proj": [1]}, **settings)


def test_a_configuration_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ActValueError, match=r"cannot be read \(No such file or directory\), expected a file"):
        ActConfig.from_json_file(str(tmp_path / "x"))
    with pytest.raises(ActValueError, match=r"adapter_config\.json cannot be used .Can't find"):
        ActConfig.from_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NONE_SUCH"}')
    with pytest.raises(ActValueError, match=r"adapter_config\.json cannot be used .KeyError: 'NONE_SUCH'"):
        ActConfig.from_pretrained(str(tmp_path))
