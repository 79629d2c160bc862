"""Expressions and ranks in the configuration of a donor that is an adapter from a stranger."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from act_peft import ActConfig, ActValueError, localize
from tests.support.tiny_models import batch, build, random_mask


def changed(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def save(folder, config):
    torch.manual_seed(0)
    get_peft_model(build("llama"), config).save_pretrained(folder)
    return folder


def weights(folder):
    return localize(build("llama"), str(folder), score="weight")


def test_expressions_choose_the_same_modules(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, rank_pattern={"v_proj": 3})
    save(tmp_path, config)
    expected = weights(tmp_path)
    changed(tmp_path, target_modules=r".*\.layers\.\d+\.self_attn\.(q|v)_proj", rank_pattern={".*v_proj": 3})
    got = weights(tmp_path)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_modules": r"(.*)\1X"}, r"regular expression .* is not known at its place"),
        ({"exclude_modules": "(?=a)"}, "a group of a special kind"),
        ({"alpha_pattern": {"(((": 1}}, "a bracket is not closed"),
        ({"modules_to_save": ["(a+)+"]}, r"modules_to_save: got '\(a\+\)\+', expected names of modules"),
        ({"layers_pattern": "(a+)+", "layers_to_transform": [0]}, r"layers_pattern: got .*, expected names"),
        ({"r": 10**9}, r"r: got 1000000000, expected at most \d+, the largest size of the adapter's tensors"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"rank_pattern: got 1000000000, expected at most"),
    ],
)
def test_what_has_no_end_is_refused(tmp_path, changes, match):
    save(tmp_path, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ActValueError, match=match):
        weights(changed(tmp_path, **changes))


@pytest.mark.parametrize("slow", ["([a-z_.0-9]+)*X", ".*" * 14 + "x!"])
def test_slow_expressions_end(tmp_path, slow):
    save(tmp_path, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ActValueError, match="cannot be loaded as an adapter of the base"):  # it matches no module
        weights(changed(tmp_path, target_modules=slow))
    assert len(weights(changed(tmp_path, target_modules=["q_proj"], exclude_modules=slow)))
    assert len(weights(changed(tmp_path, alpha_pattern={slow: 1})))


def test_other_methods_expressions_too(tmp_path):
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    save(tmp_path, config)
    expected = weights(tmp_path)
    got = weights(changed(tmp_path, target_modules=".*(k|down)_proj", feedforward_modules=".*down_proj"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("slow", ["([a-z_.0-9]+)*X", "(?=a)"])
def test_an_act_adapter_needs_no_expression(tmp_path, slow):
    base = build("llama")
    model = get_peft_model(build("llama"), ActConfig(channels=random_mask(base, 0.2), init_weights=False))
    model.save_pretrained(tmp_path)
    expected = model(input_ids=batch()).logits
    changed(
        tmp_path,
        target_modules=slow,
        exclude_modules=slow,
        layers_pattern=slow,
        layers_to_transform=None,
    )
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path))
    assert torch.equal(loaded(input_ids=batch()).logits, expected)
    assert loaded.peft_config["default"].exclude_modules is None
