"""Tied embeddings: a delta belongs to one use of the shared weight, merged or not, as PEFT has it for its adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import ActConfig
from tests.support.tiny_models import batch, build, state_bytes

TIED = ("gemma", "gpt2")
EMBEDDING = {"gemma": "embed_tokens", "gpt2": "wte"}
PART_WAYS = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")


def adapted(family, *uses):
    model = build(family)
    channels = {"embedding": (EMBEDDING[family], [1, 5]), "head": ("lm_head", [3, 4, 40])}
    config = ActConfig(channels=dict(channels[use] for use in uses), init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def by_hand(family, uses, tuned):
    """The logits of a model that has two weights in place of the shared one, each changed by its own deltas."""
    model = build(family, tie_word_embeddings=False)
    shared = build(family).get_input_embeddings().weight.detach()
    head, embedding = shared.clone(), shared.clone()
    layers = tuned.get_base_model()
    if "head" in uses:
        head[[3, 4, 40]] += layers.lm_head.act_delta_weight["default"].detach()
    if "embedding" in uses:
        name = next(n for n, _ in layers.named_modules() if n.endswith(EMBEDDING[family]))
        embedding[:, [1, 5]] += layers.get_submodule(name).act_delta_weight["default"].detach()
    state = build(family).state_dict()
    model.load_state_dict(state)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight.copy_(head)
    return model(batch()).logits


USES = [("embedding",), ("head",), ("embedding", "head")]


@PART_WAYS
@pytest.mark.parametrize("uses", USES, ids="+".join)
@pytest.mark.parametrize("family", TIED)
def test_each_use_of_the_weight_has_its_own_delta_merged_or_not(family, uses):
    tuned = adapted(family, *uses)
    before, expected = state_bytes(tuned.get_base_model()), by_hand(family, uses, tuned)
    torch.testing.assert_close(tuned(batch()).logits, expected, rtol=1e-4, atol=1e-4)
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(batch()).logits, expected, rtol=1e-4, atol=1e-4)
    tuned.unmerge_adapter()
    assert state_bytes(tuned.get_base_model()) == before
    base = tuned.get_base_model()
    plain = [getattr(m, "base_layer", m) for m in (base.get_input_embeddings(), base.lm_head)]
    assert plain[0].weight is plain[1].weight


@PART_WAYS  # PEFT also says how to untie a model
@pytest.mark.parametrize("uses", USES, ids="+".join)
@pytest.mark.parametrize("family", TIED)
def test_a_merged_model_is_untied_says_so_and_survives_saving(family, uses, tmp_path):
    tuned = adapted(family, *uses)
    expected = by_hand(family, uses, tuned)
    with pytest.warns(UserWarning, match="Input and output embeddings are no longer tied after merging"):
        merged = copy.deepcopy(tuned).merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.eval()(batch()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TIED)
def test_an_adapter_of_both_uses_is_saved_and_loaded(family, tmp_path):
    tuned = adapted(family, "embedding", "head")
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(loaded(batch()).logits, tuned(batch()).logits)
