"""What other libraries get when they ask a PEFT model for its output layer."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from act_peft import ActConfig
from act_peft.layers.output_head import seen_from_outside
from tests.support.tiny_models import build

SELECTED = [3, 5]


def adapted(family="llama", *channels, **settings):
    config = ActConfig(
        channels={"lm_head": SELECTED, **{name: [1] for name in channels}},
        init_weights=False,
        task_type="CAUSAL_LM",
        **settings,
    )
    return get_peft_model(build(family), config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_its_weight_is_the_adapted_one_and_trains_the_rows(family):
    model, hidden = adapted(family), torch.randn(2, 16)
    head = model.get_output_embeddings()
    assert not isinstance(head, BaseTunerLayer)  # TRL refuses those
    layer = model.get_base_model().lm_head
    torch.testing.assert_close(nn.functional.linear(hidden, head.weight, head.bias), layer(hidden))
    torch.testing.assert_close(head(hidden), layer(hidden))
    changed = (head.weight != layer.get_base_layer().weight).any(1).nonzero().flatten().tolist()
    assert changed == SELECTED
    head.weight.sum().backward()
    assert layer.act_delta_weight["default"].grad.abs().min() > 0
    assert head.base_layer is layer.get_base_layer()
    assert (head.in_features, head.out_features) == (16, 48)
    assert not list(head.parameters())


def test_with_the_adapter_off_or_merged_it_is_the_model_s():
    model = adapted()
    layer = model.get_base_model().lm_head
    with model.disable_adapter():
        assert torch.equal(model.get_output_embeddings().weight, layer.get_base_layer().weight)
    model.merge_adapter()
    assert torch.equal(model.get_output_embeddings().weight, layer.get_base_layer().weight)


def test_other_output_layers_are_as_they_are():
    model = get_peft_model(build("llama"), ActConfig(channels={"q_proj": [1]}, task_type="CAUSAL_LM"))
    assert model.get_output_embeddings() is model.get_base_model().lm_head
    assert seen_from_outside(None) is None


def test_a_quantized_one_is_seen_with_its_adapter_and_refused_by_trainers():
    model = adapted()
    model.get_base_model().lm_head.is_quantized = True
    assert isinstance(model.get_output_embeddings(), BaseTunerLayer)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("channels", [(), ("embed_tokens",)])
def test_saving_with_embeddings_finds_the_same_layers(channels):
    model = adapted("llama", *channels)
    saved = get_peft_model_state_dict(model, save_embedding_layers=True)
    plain = {name for name in saved if "act_delta" not in name}
    assert any(name.endswith("lm_head.base_layer.weight") for name in plain)
