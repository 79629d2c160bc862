"""The modules of an adapter: decided once, asked by PEFT, and without a trace in the configuration."""

from __future__ import annotations

import copy

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import inspect_matched_modules

from act_peft import ActConfig, ChannelMask
from act_peft.layers import targets
from act_peft.layers.targets import find_targets, target_answers
from tests.support.tiny_models import build

CHANNELS = {"q_proj": [0, 2], "up_proj": [1]}


def test_every_module_is_decided_once(monkeypatch):
    asked = []
    rule = targets.check_target_module_exists
    monkeypatch.setattr(
        targets, "check_target_module_exists", lambda config, name: asked.append(name) or rule(config, name)
    )
    model = build("llama")
    get_peft_model(model, ActConfig(channels=CHANNELS))
    assert asked
    assert len(asked) == len(set(asked))


def test_peft_gets_its_own_marker_for_excluded_modules():
    model = build("llama")
    config = ActConfig(channels=CHANNELS, exclude_modules=["up_proj"])
    answers = find_targets(config, model, None).answers
    assert answers.keys() == dict(model.named_modules()).keys()
    excluded = {name for name, answer in answers.items() if type(answer).__name__ == "_ExcludedModule"}
    assert excluded == {name for name in answers if name.endswith("up_proj")}
    # PEFT warns if it was never given the marker.
    get_peft_model(model, config)
    with pytest.warns(UserWarning, match="no modules were excluded"):
        get_peft_model(build("llama"), ActConfig(channels=CHANNELS, exclude_modules=["nowhere"]))


def test_peft_can_ask_at_any_time():
    tuned = get_peft_model(build("llama"), ActConfig(channels=CHANNELS))
    matched = inspect_matched_modules(tuned.base_model)["matched"]
    assert {name.rpartition(".")[2] for name in matched} == set(CHANNELS)


def test_a_question_does_not_write_the_configuration(tmp_path):
    model = build("llama")
    ChannelMask.from_dict({"lm_head": [1]}, {"lm_head": model.lm_head.out_features}).save(tmp_path / "mask")
    config = ActConfig(channels=tmp_path / "mask")
    before = copy.deepcopy(vars(config))
    assert target_answers(config, ["lm_head", "x"]) == {"lm_head": True, "x": False}
    assert list(find_targets(config, model, None).indices) == ["lm_head"]
    assert vars(config) == before
