"""Exports for serving engines: by each engine's own rule they give the adapter's outputs, or they are refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from act_peft import ActConfig, ActValueError, ActWarning, ChannelMask, export_lora
from act_peft.channels.kinds import ChannelKind, channel_kind
from tests.support.engines import ENGINES, VLLM_RANKS, read, served, sglang, vllm
from tests.support.exports import TOLERANCES, adapted, config_of, layers_of, tensors_of
from tests.support.tiny_models import batch, build, random_mask

TIGHT = TOLERANCES[torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def linear_channels(base, density=0.4) -> ChannelMask:
    """Channels of all linear layers but the output layer, in numbers that differ from module to module."""
    mask = random_mask(base, density)
    kept = [n for n in mask if channel_kind(base.get_submodule(n)) is ChannelKind.LINEAR and n != "lm_head"]
    return ChannelMask({n: mask[n] for n in kept}, {n: mask.num_channels[n] for n in kept})


@pytest.mark.parametrize("source", ["memory", "folder"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("target", ENGINES)
def test_the_engine_gives_the_adapters_outputs(target, family, source, tmp_path):
    base = build(family)
    base.save_pretrained(tmp_path / "base")
    fresh = copy.deepcopy(base)
    model = adapted(base, channels=linear_channels(base), include_bias=False)
    if source == "folder":
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "act")
    result = export_lora(model if source == "memory" else tmp_path / "act", tmp_path / "lora", target=target)
    expected = model(batch()).logits
    assert (fresh(batch()).logits - expected).abs().max() > 100 * TIGHT["atol"]
    found = served(copy.deepcopy(fresh), ENGINES[target](tmp_path / "lora"))(batch()).logits
    torch.testing.assert_close(found, expected, **TIGHT)
    config = config_of(tmp_path / "lora")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert set(result.ranks.values()) == {config["r"]} == {config["lora_alpha"]}
    assert result.error == 0
    lora = PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()  # and in PEFT itself
    torch.testing.assert_close(lora(batch()).logits, expected, **TIGHT)


def test_the_usual_export_is_wrong_by_these_rules(tmp_path):
    """The rules can tell: an export for PEFT, with a rank for each module, comes out too strong."""
    base = build("llama")
    fresh = copy.deepcopy(base)
    model = adapted(base, channels={"q_proj": [0], "up_proj": list(range(9)), "down_proj": [1, 2]})
    export_lora(model, tmp_path / "lora")
    found = served(fresh, ENGINES["llama.cpp"](tmp_path / "lora"))(batch()).logits
    assert (found - model(batch()).logits).abs().max() > 100 * TIGHT["atol"]
    for rule in (vllm, sglang):
        with pytest.raises(AssertionError):
            rule(tmp_path / "lora")


@pytest.mark.parametrize(("needed", "rank"), [(1, 1), (2, 8), (9, 16), (40, 64), (64, 64), (300, 320), (400, 512)])
def test_vllm_gets_a_rank_that_it_accepts(needed, rank, tmp_path):
    base = torch.nn.ModuleDict({"proj": torch.nn.Linear(520, 520, bias=False)})
    mask = ChannelMask({"proj": torch.arange(needed)}, {"proj": 520})
    model = get_peft_model(base, ActConfig(channels=mask, init_weights=False))
    assert export_lora(model, tmp_path / "lora", target="vllm").ranks == {"proj": rank}
    assert rank in VLLM_RANKS
    (pair,) = read(tmp_path / "lora")[1].values()
    assert pair["A"].shape == (rank, 520)
    assert not pair["A"][needed:].any()
    delta = model.base_model.model["proj"].get_delta_weight("default")
    assert torch.equal(vllm(tmp_path / "lora")["proj"], delta)


def test_a_rank_beyond_all_is_refused_before_anything_is_written(tmp_path):
    base = torch.nn.ModuleDict({"proj": torch.nn.Linear(520, 520, bias=False)})
    mask = ChannelMask({"proj": torch.arange(513)}, {"proj": 520})
    model = get_peft_model(base, ActConfig(channels=mask, init_weights=False))
    with pytest.raises(ActValueError, match=r"vLLM: the factors have rank 513, expected at most 512 \(pass max_rank"):
        export_lora(model, tmp_path / "lora", target="vllm")
    assert list(tmp_path.iterdir()) == []
    result = export_lora(model, tmp_path / "lora", target="vllm", max_rank=512)
    assert 0 < result.error < 0.05
    assert 1 < result.rank_for_5_percent <= 512


def test_the_rank_for_5_percent_is_true(tmp_path):
    model = adapted(build("llama"), channels=linear_channels(build("llama")))
    rank = export_lora(model, tmp_path / "low", target="llama.cpp", max_rank=1).rank_for_5_percent
    assert export_lora(model, tmp_path / "enough", target="llama.cpp", max_rank=rank).error <= 0.05
    assert export_lora(model, tmp_path / "less", target="llama.cpp", max_rank=rank - 1).error > 0.05


def test_sglang_gets_the_siblings_that_it_stacks(tmp_path):
    base = build("llama")
    model = adapted(base, channels={"layers.0.self_attn.v_proj": [1], "layers.1.mlp.up_proj": [0, 2]})
    result = export_lora(model, tmp_path / "lora", target="sglang")
    attention = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert sorted(result.ranks) == sorted([*attention, *(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up"))])
    assert not tensors_of(tmp_path / "lora")[f"base_model.model.{attention[0]}.lora_A.weight"].any()
    assert config_of(tmp_path / "lora")["target_modules"] == sorted(result.ranks)
    model.save_pretrained(tmp_path / "act")
    with pytest.raises(ActValueError, match=r"k_proj.*: SGLang loads q_proj/k_proj/v_proj or .* expected it \(pass b"):
        export_lora(tmp_path / "act", tmp_path / "other", target="sglang")
    base.save_pretrained(tmp_path / "base")
    export_lora(tmp_path / "act", tmp_path / "other", target="sglang", base=tmp_path / "base")
    assert tensors_of(tmp_path / "other").keys() == tensors_of(tmp_path / "lora").keys()


# ------------------------------------------------------------------------------------- what an engine cannot load ---


@pytest.mark.parametrize("target", ENGINES)
def test_biases_and_norms_are_refused(target, tmp_path):
    model = adapted(build("qwen2"), channels={"q_proj": [0], "norm": [1]}, biases=True)
    with pytest.raises(ActValueError, match=r"q_proj, .*model\.norm: deltas of biases .*include_bias=False"):
        export_lora(model, tmp_path / "lora", target=target)


@pytest.mark.parametrize("target", ENGINES)
def test_whole_modules_and_tokens_are_refused(target, tmp_path):
    for settings, name in (
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [3]}, "model.embed_tokens"),
    ):
        model = adapted(build("llama"), channels={"q_proj": [0]}, **settings)
        with pytest.raises(ActValueError, match=f"^{name}: .* loads factors only, expected no modules or tokens"):
            export_lora(model, tmp_path / "lora", target=target)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma", True)])
def test_embeddings_and_output_layers_come_with_a_warning(target, family, tied, tmp_path):
    base = build(family)
    fresh = copy.deepcopy(base)
    model = adapted(base, channels={"lm_head": [1, 5], "embed_tokens": [0, 3]})
    with pytest.warns(ActWarning, match=r"lm_head, model.embed_tokens: \w+ loads factors of embeddings .* only for"):
        export_lora(model, tmp_path / "lora", target=target)
    found = served(fresh, ENGINES[target](tmp_path / "lora"))(batch()).logits
    torch.testing.assert_close(found, model(batch()).logits, **TIGHT)


def test_llama_cpp_has_one_tensor_for_tied_weights(tmp_path):
    with pytest.raises(ActValueError, match=r"lm_head: llama\.cpp has one tensor for an embedding and an "):
        export_lora(adapted(build("gemma"), channels={"lm_head": [1]}), tmp_path / "lora", target="llama.cpp")
    base = build("llama")
    fresh = copy.deepcopy(base)
    model = adapted(base, channels={"lm_head": [1], "embed_tokens": [2]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActWarning)
        export_lora(model, tmp_path / "lora", target="llama.cpp")
    found = served(fresh, ENGINES["llama.cpp"](tmp_path / "lora"))(batch()).logits
    torch.testing.assert_close(found, model(batch()).logits, **TIGHT)
    model.save_pretrained(tmp_path / "act")
    with pytest.warns(ActWarning, match=r"lm_head, .*: the base is not on this machine, .* \(pass base"):
        export_lora(tmp_path / "act", tmp_path / "other", target="llama.cpp")


def test_gpt2_has_layers_that_llama_cpp_transposes(tmp_path):
    base = build("gpt2")
    fresh = copy.deepcopy(base)
    model = adapted(base, channels={"c_fc": [1, 4]}, include_bias=False)
    with pytest.raises(ActValueError, match=r"c_fc, .*: llama\.cpp cannot load factors of GPT-2's transposed layers"):
        export_lora(model, tmp_path / "lora", target="llama.cpp")
    export_lora(model, tmp_path / "lora", target="vllm")
    found = served(fresh, vllm(tmp_path / "lora"))(batch()).logits
    torch.testing.assert_close(found, model(batch()).logits, **TIGHT)


def test_the_size_is_said_before_it_is_written(saved, tmp_path, caplog, monkeypatch):
    def stop(*_, **__):
        raise OSError("stopped")

    monkeypatch.setattr("act_peft.export.folder.write_tensors", stop)
    caplog.set_level("INFO", "act_peft.export")
    with pytest.raises(ActValueError, match="stopped"):
        export_lora(saved[0], tmp_path / "lora")
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'lora'}: writing 0.0 MB"]


def test_rows_of_an_output_layer_need_no_more_than_its_inputs(tmp_path):
    model = adapted(build("llama"), channels={"lm_head": list(range(40))})
    result = export_lora(model, tmp_path / "lora")
    assert result.ranks == {"lm_head": 16}
    product = vllm(tmp_path / "lora")["lm_head"]
    assert torch.equal(product, layers_of(model)["lm_head"].get_delta_weight("default"))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 16
