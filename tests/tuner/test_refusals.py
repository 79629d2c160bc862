"""Modules that cannot be adapted are refused by name, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftMixedModel, get_peft_model
from torch import nn

from act_peft import ActConfig, ActTypeError, ActValueError
from tests.support.tiny_models import DECODER, batch, build, state_bytes


def refused(model, channels, error, match):
    before, names = state_bytes(model), [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        get_peft_model(model, ActConfig(channels=channels))
    assert state_bytes(model) == before
    assert [name for name, _ in model.named_modules()] == names


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.conv1d = nn.Conv1d(2, 2, 1)
        self.conv2d = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("conv1d", ActTypeError, "conv1d: Conv1d is not supported, expected Linear"),
        ("conv2d", ActTypeError, "conv2d: Conv2d is not supported, expected Linear"),
        ("attention", ActTypeError, "attention: MultiheadAttention is not supported"),
        (
            "attention.in_proj_weight",
            ActTypeError,
            r"attention.in_proj_weight is a parameter \[24, 8\] of MultiheadAttention, expected the name of a Linear",
        ),
        (
            "attention.out_proj",
            ActValueError,
            r"attention.out_proj: cannot be adapted in nn.MultiheadAttention, which reads .*exclude_modules=\['out",
        ),
        (
            "linear1",
            ActValueError,
            r"encoder.linear1: cannot be adapted in the fast path of nn.TransformerEncoderLayer",
        ),
    ],
)
def test_modules_that_torch_does_not_call(name, error, match):
    refused(Attention(), {name: [0]}, error, match)


def test_an_encoder_layer_of_torch_without_its_fast_path():
    torch.manual_seed(0)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, x = Attention().eval(), torch.randn(2, 3, 8)
        expected = model(x)
        tuned = get_peft_model(model, ActConfig(channels={"linear1": [0, 1], "norm2": [2]}, init_weights=False)).eval()
        assert not torch.allclose(tuned(x), expected)
        result = tuned(x)
        torch.testing.assert_close(tuned.merge_and_unload()(x), result)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


EXPERTS = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
}


def mixture(family):
    model_class, config_class, settings = EXPERTS[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**DECODER, **settings})).eval()


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "experts.gate_up_proj",
            r"channels: model.layers.0.mlp.experts.gate_up_proj is a parameter \[4, \d+, 16\] of \w+Experts, expected "
            r"the name of a Linear.*LoraConfig\(target_parameters=",
        ),
        (
            "model.layers.1.mlp.experts.down_proj",
            r"model.layers.1.mlp.experts.down_proj is a parameter \[4, 16, \d+\]",
        ),
        ("experts", r"mlp.experts: \w+Experts is not supported, expected Linear .*exclude_modules"),
        ("mlp.gate", r"mlp.gate: \w+Router is not supported, expected Linear"),
    ],
)
def test_fused_experts(family, name, match):
    refused(mixture(family), {name: [0]}, ActTypeError, match)


@pytest.mark.parametrize("family", EXPERTS)
def test_what_is_no_expert_of_a_mixture_can_be_adapted(family):
    model = mixture(family)
    expected = model(batch()).logits
    channels = {"q_proj": [0, 3], "input_layernorm": [1], "embed_tokens": [2], "norm": [4]}
    if family == "qwen2_moe":
        channels |= {"shared_expert.up_proj": [0, 7], "shared_expert_gate": [0]}
    tuned = get_peft_model(model, ActConfig(channels=channels, init_weights=False)).eval()
    result = tuned(batch()).logits
    assert not torch.allclose(result, expected)
    torch.testing.assert_close(tuned.merge_and_unload()(batch()).logits, result, rtol=1e-3, atol=1e-3)


def test_the_name_of_a_weight_is_answered_with_what_a_module_is():
    refused(build("llama"), {"q_proj.weight": [0]}, ActTypeError, r"q_proj.weight is a parameter \[16, 16\] of Linear")


def test_peft_s_mixed_model_says_which_types_it_takes():
    """PEFT keeps a fixed list; the way to mix is merging one kind of adapter before the other is added."""
    with pytest.raises(
        ValueError, match=r"'ACT' is not compatible with the .PeftMixedModel.. Compatible types are: .*LORA"
    ):
        get_peft_model(build("llama"), ActConfig(channels={"q_proj": [0]}), mixed=True)
    with pytest.raises(ValueError, match=r"'ACT' is not compatible with the .PeftMixedModel."):
        PeftMixedModel(build("llama"), ActConfig(channels={"q_proj": [0]}))
