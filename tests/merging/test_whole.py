"""Whole modules, resized embeddings and rows of tokens that adapters hold beside deltas, merged on disk."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from act_peft import ActConfig, ActLoadError, ActValueError, ActWarning, merge_checkpoint
from tests.support.byproducts import CASES, MORE, QUIET, load_base, save_case
from tests.support.tiny_checkpoints import change_adapter
from tests.support.tiny_models import DECODER, batch, state_bytes

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"


def tensors_in(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "1GB"), (torch.bfloat16, "5KB")])
def test_the_result_is_that_of_memory_bit_for_bit(case, dtype, size, tmp_path):
    save_case(tmp_path, case, dtype=dtype, size=size)
    base = load_base(tmp_path / "base", resized=CASES[case][2])
    expected = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload()
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert state_bytes(merged) == state_bytes(expected)
    assert torch.equal(merged(batch()).logits, expected(batch()).logits)
    expected.save_pretrained(tmp_path / "memory", max_shard_size=size)
    written, wanted = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "memory")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "memory")]
    assert configs[0] == configs[1]
    if size == "5KB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == written.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in written.values())


def test_a_weight_does_not_count_for_what_is_no_delta(tmp_path):
    save_case(tmp_path, "head")
    with pytest.warns(ActWarning, match=r"its weight 0.5 does not count for lm_head.weight"):
        merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", weights=[0.5])
    model = PeftModel.from_pretrained(load_base(tmp_path / "base", resized=False), tmp_path / "a")
    model.base_model.set_scale("default", 0.5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert state_bytes(merged) == state_bytes(model.merge_and_unload())


def refused(folder, match, *adapters):
    with pytest.raises(ActValueError, match=match):
        merge_checkpoint(folder / "base", adapters or folder / "a", folder / "out")
    assert not (folder / "out").exists()


def second_adapter(folder, case, change=lambda tensors: None):
    """A second adapter for the same base."""
    (folder / "second").mkdir()
    save_case(folder / "second", case)
    path = folder / "second" / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return (folder / "second" / "a").rename(folder / "b")


def test_several_adapters_bring_the_same_or_are_refused(tmp_path):
    save_case(tmp_path, "resized")
    save_case(tmp_path, "resized")
    same = second_adapter(tmp_path, "resized")
    merge_checkpoint(tmp_path / "base", [tmp_path / "a", same], tmp_path / "same")
    change_adapter(same, f"{HEAD}.base_layer.weight", lambda t: t + 1)
    refused(tmp_path, "hold different values of the whole tensor", tmp_path / "a", same)


def test_what_is_one_tensor_changes_in_one_way(tmp_path):
    save_case(tmp_path, "tokens, tied")
    other = second_adapter(tmp_path, "named embeddings, tied")
    refused(tmp_path, "has rows of tokens .* which is the same tensor", tmp_path / "a", other)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    change_adapter(tmp_path / "c", f"{EMBEDDING}.token_adapter.trainable_tokens_delta", lambda t: t + 1)
    refused(tmp_path, "have rows of the same tokens", tmp_path / "a", tmp_path / "c")


def test_a_saved_module_and_channels_of_it_are_refused(tmp_path):
    save_case(tmp_path, "head")
    other = second_adapter(tmp_path, "named embeddings")
    refused(tmp_path, r"lm_head: is saved as a whole .*changes channels or tokens of it", tmp_path / "a", other)


def test_whole_tensors_that_do_not_fit_are_refused(tmp_path):
    save_case(tmp_path, "tokens, resized")
    path = tmp_path / "a" / "adapter_model.safetensors"
    good = path.read_bytes()

    def damaged(key, change, match):
        path.write_bytes(good)
        change_adapter(tmp_path / "a", f"base_model.model.{key}", change)
        refused(tmp_path, match)

    damaged("lm_head.weight", lambda _: None, "holds resized embeddings, but not all that depends")
    damaged("lm_head.weight", lambda t: t[:-1].clone(), r"would have \[5[34], 16\] beside embeddings of 5[34]")
    damaged("lm_head.weight", lambda t: t[:, :-1].clone(), "size mismatch: .*a holds")
    damaged("lm_head.weight", lambda t: t.fill_(float("nan")), "holds NaN or infinity")
    damaged("score.weight", lambda _: torch.ones(2, 16), "saves it as a whole, .* has no such tensor")
    damaged("model.norm.weight", lambda _: torch.ones(16), "model.norm.weight: .* with other values than")
    damaged("model.norm.act", lambda _: torch.ones(16), "got a tensor that is no channel delta")


def test_rows_of_tokens_that_do_not_fit_are_refused(tmp_path):
    save_case(tmp_path, "tokens")
    key = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    path, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    good, written = path.read_bytes(), json.loads(config.read_text())
    change_adapter(tmp_path / "a", key, lambda t: t[:, :-1].clone())
    refused(tmp_path, "has rows .* of tokens up to 11, the base has")
    path.write_bytes(good)
    change_adapter(tmp_path / "a", key, lambda t: t.fill_(float("inf")))
    refused(tmp_path, "the rows of tokens of .* hold NaN or infinity")
    path.write_bytes(good)
    for listed, match in (([10], "for n different tokens"), ([10, 10], "for n different"), ([10, MORE], "up to 54")):
        config.write_text(json.dumps({**written, "trainable_token_indices": listed}))
        refused(tmp_path, match)


def test_a_quantized_tensor_is_not_replaced(tmp_path):
    save_case(tmp_path, "inner modules")
    path = tmp_path / "base" / "model.safetensors"
    tensors = {k: t.to(torch.int8) if k.endswith("o_proj.weight") else t for k, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    refused(tmp_path, "o_proj.weight is I8, expected F64")


def test_a_part_of_a_tensor_is_not_replaced(tmp_path):
    base = MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=2))
    base.save_pretrained(tmp_path / "base")
    config = ActConfig(channels={"q_proj": [0]}, modules_to_save=["experts"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "a")
    refused(tmp_path, "expected a tensor|computed from|made of")


def test_a_base_without_the_vocabulary_is_refused_in_memory_with_the_way_out(tmp_path):
    save_case(tmp_path, "resized, tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = state_bytes(base)
    with pytest.raises(ActLoadError, match=rf"size mismatch: .*call model.resize_token_embeddings\({MORE}\) first"):
        PeftModel.from_pretrained(base, tmp_path / "a")
    assert state_bytes(base) == before


@pytest.mark.parametrize("case", CASES)
def test_in_memory_it_loads_as_it_was(case, tmp_path):
    model = save_case(tmp_path, case)
    loaded = PeftModel.from_pretrained(load_base(tmp_path / "base", resized=CASES[case][2]), tmp_path / "a").eval()
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
