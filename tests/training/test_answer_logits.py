"""Logits at the answer tokens alone: those of the whole batch, for models that can do it and for those that cannot."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from act_peft import ActConfig
from act_peft.batches.predictions import find_predictions, logits_of
from act_peft.peft_modules import without_wrapper
from act_peft.training.answer_logits import AnswerLogits, only_at, same_logits
from tests.support.teaching import keep_batch
from tests.support.tiny_models import FAMILIES, build

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # of PEFT


class Own(nn.Module):
    """A language model of one's own, with an output layer that it may not call."""

    def __init__(self, way="calls"):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.embedding, self.head = way, nn.Embedding(48, 8), nn.Linear(8, 48)

    def get_output_embeddings(self):
        return None if self.way == "has none" else self.head

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        if self.way == "reads the weight":
            return CausalLMOutput(logits=F.linear(hidden, self.head.weight, self.head.bias))
        logits = self.head(hidden)
        return CausalLMOutput(logits=logits - logits.mean(1, keepdim=True) if self.way == "looks around" else logits)


def rows_of(module, seen):
    return module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["none", "ACT", "LoRA", "saved"])
def test_they_are_those_of_the_whole_batch(family, method):
    model, batch = build(family), find_predictions(keep_batch())
    if method != "none":
        adapter = {
            "ACT": ActConfig(channels={"lm_head": [1, 5]}, init_weights=False, task_type="CAUSAL_LM"),
            "LoRA": LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"),
            "saved": LoraConfig(
                target_modules=["c_attn" if family == "gpt2" else "q_proj"],
                fan_in_fan_out=family == "gpt2",
                modules_to_save=["lm_head"],
            ),
        }[method]
        model = get_peft_model(model, adapter).eval()
    expected = logits_of(model, batch)[batch.positions]
    ask, seen = AnswerLogits(model), []
    torch.testing.assert_close(ask(batch), expected)
    rows_of(without_wrapper(model).get_output_embeddings(), seen)
    torch.testing.assert_close(ask(batch), expected)
    assert seen == [len(batch.positions)]
    assert ask(batch).requires_grad


@pytest.mark.parametrize("way", ["calls", "has none", "reads the weight", "looks around"])
def test_models_with_a_way_of_their_own_compute_all_of_them(way):
    model, batch, seen = Own(way), find_predictions(keep_batch()), []
    expected = logits_of(model, batch)[batch.positions]
    ask = AnswerLogits(model)
    for _ in range(2):
        torch.testing.assert_close(ask(batch), expected)
    rows_of(model.head, seen)
    ask(batch)
    assert seen == {"calls": [len(batch.positions)], "reads the weight": []}.get(way, [32])


def test_the_first_batch_leaves_no_trace():
    model, batch = build("llama").train(), find_predictions(keep_batch())
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: None)
    state = torch.random.get_rng_state()
    AnswerLogits(model)(batch).sum().backward()
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(model.lm_head._forward_pre_hooks) == [handle.id]
    with pytest.raises(RuntimeError, match="stop"), only_at(model.lm_head, batch.positions, batch.shape):
        raise RuntimeError("stop")
    assert list(model.lm_head._forward_pre_hooks) == [handle.id]


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0 + 1e-5]], True),
        ([[1.0, 2.0]], [[1.0, 2.1]], False),
        ([[1.0, 2.0]], [[1.0]], False),
        ([[1.0, float("-inf")]], [[1.0, float("-inf")]], True),
        ([[1.0, 2.0]], [[1.0, float("-inf")]], False),
        ([[float("nan")] * 2], [[float("nan")] * 2], True),
    ],
)
def test_the_same_apart_from_rounding(found, expected, same):
    assert same_logits(torch.tensor(found), torch.tensor(expected)) == same
    assert same_logits(torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[1.0, 2.01]]).bfloat16())
