"""Channels of what PEFT trains as a whole or by tokens: refused before the model is changed, not left out silently."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from act_peft import ActConfig, ActValueError, create_adapter
from tests.support.tiny_models import DECODER, build, state_bytes

ONE_OR_OTHER = r"modules_to_save takes '{key}' as a whole, .*exclude_modules=\['{last}'\], or '{key}' out of"
# channels, what is trained beside them, what is refused
BESIDE = {
    "the module": ({"lm_head": [1]}, {"modules_to_save": ["lm_head"]}, "lm_head"),
    "one around it": ({"down_proj": [1]}, {"modules_to_save": ["mlp"]}, r"layers.0.mlp.down_proj"),
    "in one layer": ({"down_proj": [1]}, {"modules_to_save": ["layers.1.mlp"]}, "layers.1.mlp.down_proj"),
    "one that PEFT finds by the end of its name": (
        {"input_layernorm": [1]},
        {"modules_to_save": ["norm"]},
        "layers.0.input_layernorm",
    ),
    "one of several": ({"lm_head": [1]}, {"modules_to_save": ["embed_tokens", "lm_head"]}, "lm_head"),
    "named twice": (
        {"lm_head": [1]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]},
        "lm_head",
    ),
    "tokens of the embedding": ({"embed_tokens": [1]}, {"trainable_token_indices": [3]}, "embed_tokens"),
    "tokens of the head": ({"lm_head": [1]}, {"trainable_token_indices": {"lm_head": [3]}}, "lm_head"),
}


def settings(channels, **changes):
    return ActConfig(channels={"q_proj": [0], **channels}, task_type="CAUSAL_LM", **changes)


def unchanged(model, step, match):
    names, before = [name for name, _ in model.named_modules()], state_bytes(model)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ActValueError, match=match):
        step()
    assert [name for name, _ in model.named_modules()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert state_bytes(model) == before


@pytest.mark.parametrize("case", BESIDE)
def test_channels_of_what_the_same_adapter_trains_otherwise_are_refused(case):
    channels, changes, name = BESIDE[case]
    model = build("llama")
    unchanged(model, lambda: get_peft_model(model, settings(channels, **changes)), name)


def test_the_message_says_both_ways_out():
    match = "layers.0.mlp.down_proj: " + ONE_OR_OTHER.format(key="mlp", last="down_proj")
    with pytest.raises(ActValueError, match=match):
        get_peft_model(build("llama"), settings({"down_proj": [1]}, modules_to_save=["mlp"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [0]},
    ],
)
def test_channels_that_the_user_leaves_out_are_left_out(changes):
    model = get_peft_model(build("llama"), settings({"lm_head": [1]}, modules_to_save=["lm_head"], **changes))
    assert all(name.endswith("q_proj") for name in model.peft_config["default"].adapted_modules)
    assert "default" in model.get_base_model().lm_head.modules_to_save


def test_modules_beside_those_that_are_saved_keep_their_channels():
    model = get_peft_model(build("llama"), settings({"v_proj": [2]}, modules_to_save=["lm_head", "mlp"]))
    assert len(model.peft_config["default"].adapted_modules) == 4


FIRST_AND_SECOND = {
    "whole, then its channels": (
        ({}, {"modules_to_save": ["lm_head"]}),
        ({"lm_head": [1]}, {}),
        r"lm_head: lm_head is trained as a whole \(modules_to_save\) by another adapter",
    ),
    "whole, then channels inside": (
        ({"down_proj": [0]}, {"modules_to_save": ["mlp.act_fn", "self_attn"], "exclude_modules": ["q_proj"]}),
        ({}, {}),
        r"layers.0.self_attn.q_proj: model.layers.0.self_attn is trained as a whole",
    ),
    "whole, then channels inside by their full name": (
        ({"down_proj": [0]}, {"modules_to_save": ["self_attn"], "exclude_modules": ["q_proj"]}),
        ({"model.layers.1.self_attn.k_proj": [0]}, {"target_modules": ["k_proj"]}),
        r"layers.1.self_attn.k_proj: model.layers.1.self_attn is trained as a whole",
    ),
    "tokens, then channels": (
        ({}, {"trainable_token_indices": [3]}),
        ({"embed_tokens": [1]}, {}),
        r"embed_tokens: model.embed_tokens is trained by tokens by another adapter",
    ),
    "channels, then whole": (
        ({"lm_head": [1]}, {}),
        ({}, {"modules_to_save": ["lm_head"]}),
        r"lm_head: has an adapter already, expected a module without one",
    ),
    "channels, then one around them": (
        ({}, {}),
        ({"down_proj": [0]}, {"modules_to_save": ["self_attn"], "exclude_modules": ["q_proj"]}),
        r"layers.0.self_attn: has an adapter already",
    ),
    "channels, then tokens": (
        ({"embed_tokens": [1]}, {}),
        ({}, {"trainable_token_indices": [3]}),
        r"embed_tokens: has an adapter already",
    ),
}


@pytest.mark.parametrize("case", FIRST_AND_SECOND)
def test_two_adapters_that_train_the_same_module_in_different_ways_are_refused(case):
    (first, its), (second, others), match = FIRST_AND_SECOND[case]
    model = get_peft_model(build("llama"), settings(first, **its))
    unchanged(model, lambda: model.add_adapter("second", settings(second, **others)), match)
    assert list(model.peft_config) == ["default"]


def test_two_adapters_may_train_the_same_module_as_a_whole_or_the_same_tokens():
    whole = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}
    model = get_peft_model(build("llama"), settings({}, **whole))
    model.add_adapter("second", settings({"v_proj": [1]}, **whole))
    assert {"default", "second"} <= set(model.get_base_model().lm_head.modules_to_save)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A base, a donor and an adapter that has rows of their heads, on disk."""
    folder = tmp_path_factory.mktemp("classifiers")
    model_class = transformers.LlamaForSequenceClassification
    base = model_class(transformers.LlamaConfig(**DECODER, num_labels=3))
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.002)
    base.save_pretrained(folder / "donor")
    create_adapter(folder / "base", folder / "donor", {"score": [0, 2]}, folder / "rows", transfer_scale=1.0)
    return folder


def classifier(folder, name):
    return transformers.LlamaForSequenceClassification.from_pretrained(folder / name)


def test_the_head_of_a_classifier_is_saved_as_a_whole_or_gets_the_rows_of_the_donor(classifiers):
    channels, donor = {"score": [0, 2]}, str(classifiers / "donor")
    head = ActConfig(channels=channels, donor=donor, transfer_scale=1.0, task_type="SEQ_CLS")
    with pytest.raises(
        ActValueError, match=r"score: modules_to_save takes 'score'.*SEQ_CLS add it: without task_type"
    ):
        get_peft_model(classifier(classifiers, "base"), head)
    rows = ActConfig(channels=channels, donor=donor, transfer_scale=1.0)
    merged = get_peft_model(classifier(classifiers, "base"), rows).merge_and_unload().score.weight
    base, donor = (classifier(classifiers, name).score.weight for name in ("base", "donor"))
    torch.testing.assert_close(merged, torch.stack([donor[0], base[1], donor[2]]))


def test_loading_rows_of_a_head_that_is_saved_as_a_whole_is_refused(classifiers):
    model = get_peft_model(classifier(classifiers, "base"), ActConfig(channels={"q_proj": [0]}, task_type="SEQ_CLS"))
    match = re.escape("score: modules_to_save takes 'score' as a whole")
    unchanged(model, lambda: model.load_adapter(classifiers / "rows", "rows"), match)
    whole = ActConfig(channels={"q_proj": [0]}, modules_to_save=["score"])
    plain = get_peft_model(classifier(classifiers, "base"), whole)
    unchanged(plain, lambda: plain.load_adapter(classifiers / "rows", "rows"), "score: score is trained as a whole")
    assert isinstance(PeftModel.from_pretrained(classifier(classifiers, "base"), classifiers / "rows"), PeftModel)
