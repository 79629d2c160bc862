"""Copies of adapters: what a configuration stands for when it is used for a second adapter of the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from act_peft import ActConfig
from act_peft.tuner.copies import find_twin
from tests.support.tiny_models import batch, build, random_mask


@pytest.fixture
def loaded(tmp_path):
    base = build("qwen2")
    config = ActConfig(channels=random_mask(base, 0.3), init_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    return PeftModel.from_pretrained(base, tmp_path)


def test_a_configuration_that_was_read_from_a_file_stands_for_its_adapter(loaded, tmp_path):
    base = copy.deepcopy(loaded).unload()
    loaded.base_model.set_scale("default", 0.5)
    loaded.add_adapter("more", loaded.peft_config["default"])
    expected = loaded(batch()).logits
    loaded.set_adapter("more")
    assert torch.equal(loaded(batch()).logits, expected)
    loaded.base_model.set_scale("more", 1.0)
    loaded.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(base, tmp_path / "both" / "more")
    assert torch.equal(again(batch()).logits, loaded(batch()).logits)


def test_a_copy_shares_no_memory(loaded):
    loaded.add_adapter("more", loaded.peft_config["default"])
    before = loaded(batch()).logits
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if name.endswith(".more"):
                parameter.add_(1.0)
    assert torch.equal(loaded(batch()).logits, before)


def test_a_configuration_with_channels_makes_a_fresh_adapter_unless_it_is_a_reference():
    one, other = ActConfig(channels={"q_proj": [0]}), ActConfig(channels={"q_proj": [0]})
    assert find_twin("b", configs={"default": one, "b": one}, awaiting=()) is None
    assert find_twin("ref", configs={"default": one, "ref": one}, awaiting=()) == "default"
    assert find_twin("ref", configs={"default": one, "ref": other}, awaiting=()) is None
    assert find_twin("ref", configs={"default": one, "ref": one}, awaiting=("default",)) is None
