"""From last hidden states to logits, the way that the model itself goes; or not at all."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import SFTTrainer

from act_peft.batches.evaluation import evaluation
from act_peft.batches.predictions import find_predictions, logits_of
from act_peft.training.head_only import find_head_only
from tests.support.teaching import keep_batch
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import COMMON, DECODER, FAMILIES, build
from tests.support.versions import skip_as_older

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]
SMALL = {**COMMON, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
# Models that do something between or after backbone and output layer.
OTHERS = {
    "Gemma 2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {**DECODER, "final_logit_softcapping": 3.0},
    ),
    "Cohere": (transformers.CohereForCausalLM, transformers.CohereConfig, {**DECODER, "logit_scale": 0.3}),
    "Granite": (transformers.GraniteForCausalLM, transformers.GraniteConfig, {**DECODER, "logits_scaling": 3.0}),
    "OPT": (transformers.OPTForCausalLM, transformers.OPTConfig, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "BERT": (transformers.BertLMHeadModel, transformers.BertConfig, {**SMALL, "is_decoder": True}),
}


def build_other(name):
    model_class, config_class, settings = OTHERS[name]
    torch.manual_seed(0)
    return model_class(config_class(**settings)).eval()


def head_of(model, batch, *, plain=False):
    with evaluation(model):
        expected = logits_of(model, batch)[batch.positions]
        return find_head_only(model, batch, plain=plain), expected


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_hidden_states_alone_give_the_model_s_logits(name):
    model = build(name) if name in FAMILIES else build_other(name)
    head, _ = head_of(model, find_predictions(keep_batch()))
    batch = find_predictions(keep_batch(seed=9))
    with evaluation(model):
        hidden = head.ask(model, batch)
        expected = logits_of(model, batch)[batch.positions]
    model.get_submodule(head._path).register_forward_pre_hook(lambda *_: pytest.fail("the backbone was run"))
    found = head(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_of_trl_on_the_model_is_left_out(tmp_path):
    model = build("llama")
    SFTTrainer(
        model, args=training_settings(tmp_path), train_dataset=prompt_completion(), processing_class=build_tokenizer()
    )
    if "forward" not in vars(model):
        skip_as_older("trl", "puts no forward on the model")
    batch = find_predictions(keep_batch())
    head, expected = head_of(model, batch)
    with evaluation(model):
        hidden = head.ask(model, batch)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the backbone was run"))
    torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_without_adapters_the_plain_output_layer_runs(target):
    config = LoraConfig(target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    model, batch = get_peft_model(build("llama"), config).eval(), find_predictions(keep_batch())
    with model.disable_adapter():
        head, base = head_of(model, batch, plain=True)
        with evaluation(model):
            hidden = head.ask(model, batch)
    torch.testing.assert_close(head(hidden), base)  # the adapter is on again
    assert head.is_plain
    assert head.is_fixed
    adapted, logits = head_of(model, batch)
    assert adapted.is_plain == (target != "lm_head")
    assert not torch.allclose(logits, base, atol=1e-3)


def test_an_adapter_deep_behind_the_backbone_is_not_left_out_unnoticed():
    config = LoraConfig(target_modules=["cls.predictions.transform.dense"], task_type="CAUSAL_LM")
    model = get_peft_model(build_other("BERT"), config).eval()
    with model.disable_adapter():
        assert head_of(model, find_predictions(keep_batch()), plain=True)[0] is None


class Own(nn.Module):
    """A language model that says nothing of hidden states, or needs more than these."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.backbone, self.head = way, Backbone(way), nn.Linear(8, 48)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        output = self.backbone(input_ids)
        logits = self.head(output.last_hidden_state)
        if self.way == "reads the tokens again":
            logits = logits + nn.functional.one_hot(input_ids, 48)[:, : logits.shape[1]].float().mean(1, keepdim=True)
        if self.way == "needs more":
            logits = logits + output.hidden_states[0].mean()
        return CausalLMOutput(logits=logits)


class Backbone(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.embedding = way, nn.Embedding(48, 8)

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        if self.way == "no output class":
            return type("Output", (), {"last_hidden_state": hidden})
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


@pytest.mark.parametrize(
    ("way", "found"),
    [("plain", True), ("no output class", False), ("reads the tokens again", False), ("needs more", False)],
)
def test_a_model_that_cannot_be_taken_apart_is_none(way, found):
    head, _ = head_of(Own(way), find_predictions(keep_batch()))
    assert (head is not None) == found


def test_it_holds_nothing_of_the_backbone():
    model = build("llama")
    head, _ = head_of(model, find_predictions(keep_batch()))
    layer, output = weakref.ref(model.model.layers[0].mlp.up_proj.weight), model.lm_head.weight
    del model
    gc.collect()
    assert layer() is None
    assert any(parameter is output for parameter in head._copy.parameters())


def test_what_trains_is_not_fixed():
    model = build("llama").requires_grad_(False)
    head, _ = head_of(model, find_predictions(keep_batch()))
    assert head.is_fixed
    model.lm_head.weight.requires_grad_(True)
    assert not head.is_fixed


def test_it_runs_in_the_precision_in_which_the_model_ran():
    model, batch = build("llama"), find_predictions(keep_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head, expected = head_of(model, batch)
        with evaluation(model):
            hidden = head.ask(model, batch)
    assert expected.dtype == torch.bfloat16
    assert head(hidden).dtype == torch.bfloat16
