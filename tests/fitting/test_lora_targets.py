"""LoRA adapters of a fitted transfer for serving engines: by each engine's rule they are those for PEFT."""

from __future__ import annotations

import pytest
import torch

from act_peft import ActValueError, ActWarning, fit
from tests.support.engines import ENGINES
from tests.support.exports import config_of, tensors_of
from tests.support.tiny_models import batch, build_relatives

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def fitted(request):
    base, donor = build_relatives(request.param)
    batches = [{"input_ids": batch()}]
    return fit(base, donor, batches, exclude_modules=["lm_head", "k_proj", "gate_proj"]), base


@pytest.mark.parametrize("target", ENGINES)
def test_the_products_are_those_of_the_usual_adapter(fitted, target, tmp_path):
    transfer, _base = fitted
    transfer.to_lora(3, tmp_path / "peft")
    found = transfer.to_lora(3, tmp_path / "engine", target=target)
    config, usual = config_of(tmp_path / "engine"), tensors_of(tmp_path / "peft")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert set(found.ranks.values()) == {config["r"]} == {config["lora_alpha"]} == {8 if target == "vllm" else 3}
    added = ENGINES[target](tmp_path / "engine")
    for name, change in added.items():
        keys = [f"base_model.model.{name}.lora_{part}.weight" for part in "BA"]
        if keys[0] not in usual:
            assert target == "sglang"
            assert name.endswith(("k_proj", "gate_proj"))
            assert not change.any()
            assert found.errors[name] == 0
            continue
        torch.testing.assert_close(change, usual[keys[0]] @ usual[keys[1]])
    assert len(added) == len(found.ranks)


def test_biases_are_left_out_and_named(fitted, tmp_path):
    transfer, base = fitted
    found = transfer.to_lora(2, tmp_path / "lora", target="vllm")
    biased = {
        f"{name}.bias" for name in transfer.modules if getattr(base.get_submodule(name), "bias", None) is not None
    }
    assert biased <= set(found.left_out)
    assert not [key for key in tensors_of(tmp_path / "lora") if key.endswith("bias")]


@pytest.mark.parametrize("settings", [{"norms": True}, {"tokens": 0.5}])
def test_norms_and_tokens_are_refused(fitted, settings, tmp_path):
    with pytest.raises(
        ActValueError, match="vLLM loads factors only, expected no modules or tokens that are saved as"
    ):
        fitted[0].to_lora(2, tmp_path / "lora", target="vllm", **settings)


def test_an_embedding_comes_with_a_warning(fitted, tmp_path):
    with pytest.warns(ActWarning, match=r"embed_tokens: vLLM loads factors of embeddings"):
        fitted[0].to_lora(2, tmp_path / "lora", target="vllm", embedding_rank=2)
    assert "model.embed_tokens" in ENGINES["vllm"](tmp_path / "lora")


def test_a_target_that_is_none(fitted, tmp_path):
    with pytest.raises(ActValueError, match="target: got 'ollama', expected one of"):
        fitted[0].to_lora(2, tmp_path / "lora", target="ollama")
