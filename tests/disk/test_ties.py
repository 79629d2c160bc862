"""Tied parameters that part: which tensors a checkpoint needs, and what the configuration can say."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import transformers

from act_peft import ActValueError
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.layout import Layout
from act_peft.disk.skeleton import layout_of
from act_peft.disk.ties import Untied, can_say_untied, untie, without_ties
from tests.support.architecture_settings import TEXT
from tests.support.architectures import by_name


@pytest.fixture
def layout(tmp_path):
    """Makes the layout of a saved architecture."""
    with ExitStack() as stack:

        def make(name: str) -> Layout:
            by_name(name).build(0).save_pretrained(tmp_path / name)
            return layout_of(stack.enter_context(Checkpoint.open(tmp_path / name)))

        yield make


@pytest.mark.parametrize(
    ("name", "can"),
    [
        ("Qwen2ForCausalLM", True),
        ("BertForMaskedLM", True),
        ("Qwen3VLForConditionalGeneration", True),
        ("BartForConditionalGeneration", True),
        ("T5ForConditionalGeneration", False),  # reads the flag as "scale the decoder's output", and ties always
        ("UMT5ForConditionalGeneration", False),  # its forward pass reads the flag
    ],
)
def test_whether_the_configuration_can_say_that_nothing_is_tied(name, can):
    assert can_say_untied(by_name(name).build(0)) == can


def test_untying_takes_nothing_else_along(layout):
    bert = layout("BertForMaskedLM")
    embedding, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    copies = {head: embedding, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    assert untie(bert, [embedding]) == untie(bert, [head]) == Untied(copies, says_so=True)
    assert untie(bert, ["bert.pooler.dense.weight"]) == Untied()


def test_where_it_cannot_only_what_is_needed_is_new(layout):
    t5 = layout("T5ForConditionalGeneration")
    for part in ("lm_head.weight", "encoder.embed_tokens.weight"):
        assert untie(t5, [part]) == Untied({part: "shared.weight"}, says_so=False)
    # Without an unchanged tensor to be tied to, the others get one of their own.
    others = {
        f"{part}.weight": "shared.weight" for part in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }
    assert untie(t5, ["shared.weight"]) == Untied(others, says_so=False)


def test_what_is_always_one_tensor_is_refused(layout):
    found = layout("LlamaForCausalLM")
    found.model.model.norm.weight = found.model.model.layers[0].input_layernorm.weight
    with pytest.raises(ActValueError, match=r"input_layernorm\.weight: is always the same tensor as model\.norm"):
        untie(found, ["model.norm.weight"])


def test_every_part_of_a_configuration_says_it():
    config = transformers.Qwen3VLConfig(tie_word_embeddings=True, text_config={**TEXT, "tie_word_embeddings": True})
    written = {"a": [1], "text_config": {"b": 2}, "vision_config": {"c": 3}}
    assert without_ties(written, config) == {
        "a": [1],
        "text_config": {"b": 2, "tie_word_embeddings": False},
        "vision_config": {"c": 3},
        "tie_word_embeddings": False,
    }
    assert "tie_word_embeddings" not in written
