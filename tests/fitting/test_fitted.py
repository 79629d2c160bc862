from __future__ import annotations

import copy
import dataclasses
import gc
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from act_peft import ActConfig, ChannelMask, FittedTransfer, fit, merge_checkpoint
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.fitting import CollectedInputs, FitSettings
from tests.fitting.conftest import batches, relatives

ABILITY, KEEP = batches(seed=0), batches(seed=10)
TIED = ("gpt2", "gemma")


@pytest.fixture
def made(family: str):
    """Base, donor and a fit of float32 models."""
    base, donor = relatives(family, dtype=torch.float32)
    return base, donor, fit(base, donor, ABILITY, KEEP, ridge=0.1, prior_scale=0.2)


@pytest.fixture
def llama():
    base, donor = relatives("llama", dtype=torch.float32)
    return base, fit(base, donor, ABILITY, KEEP)


def moved(base: nn.Module, fitted: FittedTransfer, channels=None, tokens=None) -> nn.Module:
    """The base with some rows of the changes added by hand; all where none are named."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, module in fitted.modules.items():
            layer = model.get_submodule(name)
            index = torch.arange(len(module.delta))
            if module.is_embedding and tokens is not None:
                index = tokens.get(name, index[:0])
            elif not module.is_embedding and channels is not None:
                index = channels.get(name, index[:0])
            if module.kind.channel_dim == 1 and not module.is_embedding:
                layer.weight[:, index] += module.delta[index].T
            elif module.kind.is_norm:
                layer.weight[index] += module.delta[index, 0]
            else:
                layer.weight[index] += module.delta[index]
            if module.bias is not None:
                layer.bias[index] += module.bias[index]
    return model


def same_weights(mine: nn.Module, theirs: nn.Module, **tolerance) -> None:
    for (name, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_an_adapter_of_the_best_channels_is_those_rows(made, tmp_path) -> None:
    base, _, fitted = made
    mask = fitted.gains.top(0.3, scope="module")
    fitted.to_adapter(mask, tmp_path / "adapter", tokens=0.2)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    tokens = {
        key: values.sort(descending=True, stable=True).indices[: round(0.2 * len(values))].sort().values
        for key, values in fitted.token_gains.items()
    }
    tokens = {key: index[fitted.token_gains[key][index] > 0] for key, index in tokens.items()}
    expected = moved(base, fitted, dict(mask), tokens)
    ids = ABILITY[0]["input_ids"]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    same_weights(model.merge_and_unload(), expected, rtol=1e-6, atol=1e-7)


def test_an_adapter_passes_the_check_of_its_base(llama, tmp_path) -> None:
    base, fitted = llama
    fitted.to_adapter({"q_proj": [0, 3], "norm": [1]}, tmp_path / "adapter")
    PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))  # warns of nothing
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.norm.weight.add_(0.5)
    with pytest.warns(ActWarning, match=r"made for a base with other weights: 1 of 3 modules differ"):
        PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    records = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["adapted_modules"]
    assert records["model.norm"]["selected"] == 1
    assert records["model.norm"]["channels"] == 16
    assert all(entry["base"] for entry in records.values())


def test_a_saved_base_is_found_again(llama, tmp_path) -> None:
    base, _ = llama
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    _, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP)
    fitted.save(tmp_path / "fitted.safetensors")
    del base
    gc.collect()
    again = FittedTransfer.load(tmp_path / "fitted.safetensors")
    again.to_adapter({"q_proj": [0]}, tmp_path / "adapter", tokens=[3, 5])
    fitted.to_adapter({"q_proj": [0]}, tmp_path / "second", tokens=[3, 5])
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    records = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(entry["base"] for entry in records["adapted_modules"].values())
    assert records["trainable_token_indices"] == {"model.embed_tokens": [3, 5]}


def test_a_base_out_of_reach_records_no_fingerprint(llama, tmp_path) -> None:
    base, fitted = llama
    fitted.save(tmp_path / "fitted.safetensors")
    again = FittedTransfer.load(tmp_path / "fitted.safetensors")
    again.to_adapter({"q_proj": [0]}, tmp_path / "adapter")
    records = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["adapted_modules"]
    assert [entry["base"] for entry in records.values()] == [None, None]
    with pytest.raises(ActValueError, match=r"embed_tokens: is saved with the base's weights in it, which cannot be"):
        again.to_adapter({"q_proj": [0]}, tmp_path / "tokens", tokens=[3])
    again.to_adapter({"q_proj": [0]}, tmp_path / "tokens", tokens=[3], base=base)
    with torch.no_grad():  # a base that was trained on is another one
        base.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    with pytest.raises(ActValueError, match=r"layers\.0\.self_attn\.q_proj: the base has other weights than the one"):
        again.to_adapter({"q_proj": [0]}, tmp_path / "other", base=base)
    fitted.to_adapter({"q_proj": [0]}, tmp_path / "third")
    records = json.loads((tmp_path / "third" / "adapter_config.json").read_text())["adapted_modules"]
    assert [entry["base"] for entry in records.values()] == [None, None]


def test_an_adapter_merges_on_disk(llama, tmp_path) -> None:
    base, fitted = llama
    base.save_pretrained(tmp_path / "base")
    mask = fitted.gains.top(0.3, scope="module")
    fitted.to_adapter(mask, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    model = type(base).from_pretrained(tmp_path / "merged")
    same_weights(model, moved(base, fitted, dict(mask), {}), rtol=1e-6, atol=1e-7)


def test_a_lora_of_full_rank_is_the_whole_change(made, tmp_path) -> None:
    base, _, fitted = made
    found = fitted.to_lora(40, tmp_path / "lora", norms=True, tokens=1.0)
    assert found.error < 1e-9
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"))
    biases = {name.removesuffix(".bias") for name in found.left_out if name.endswith(".bias")}
    expected = moved(base, fitted)
    for name in biases:
        expected.get_submodule(name).bias.data.copy_(base.get_submodule(name).bias)
    assert [name for name in found.left_out if not name.endswith(".bias")] == []
    same_weights(model.merge_and_unload(), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_is_the_best_of_its_rank_and_says_what_it_lost(made, tmp_path) -> None:
    base, _, fitted = made
    found = fitted.to_lora(3, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    lost = total = 0.0
    for name, module in fitted.modules.items():
        if not module.is_linear:
            continue
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape == (found.ranks[name], module.delta.shape[1])
        left = module.directions[:, :3]
        torch.testing.assert_close(b @ a, left @ left.T @ module.delta, rtol=1e-5, atol=1e-6)
        squares = module.strengths.square()
        assert found.errors[name] == pytest.approx(float(squares[3:].sum() / squares.sum()))
        lost, total = lost + float(squares[3:].sum()), total + float(squares.sum())
    assert found.error == pytest.approx(lost / total)
    assert set(found.left_out) >= {name for name, module in fitted.modules.items() if not module.is_linear}
    PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"))
    assert "share of the fitted gain that the rank loses" in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")  # of GPT-2's output layer, harmless
def test_factors_of_an_embedding(made, tmp_path) -> None:
    base, _, fitted = made
    found = fitted.to_lora(40, tmp_path / "lora", embedding_rank=40, norms=True)
    assert found.error < 1e-9
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"))
    expected = moved(base, fitted)
    for name in found.left_out:
        expected.get_submodule(name.removesuffix(".bias")).bias.data.copy_(
            base.get_submodule(name.removesuffix(".bias")).bias
        )
    ids = ABILITY[0]["input_ids"]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-4)
    name, module = next((name, module) for name, module in fitted.modules.items() if module.is_embedding)
    low = fitted.to_lora(2, tmp_path / "low", embedding_rank=3)
    assert low.ranks[name] == 3
    assert 0 < low.errors[name] < 1
    assert ("use it unmerged" in (tmp_path / "low" / "README.md").read_text()) == module.is_tied
    with pytest.raises(ActValueError, match="tokens: given with embedding_rank, expected one of them"):
        fitted.to_lora(2, tmp_path / "both", embedding_rank=3, tokens=0.5)


def test_existing_factors_of_an_embedding_are_filled(llama) -> None:
    base, fitted = llama
    config = LoraConfig(target_modules=["embed_tokens"], r=16, lora_alpha=8, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    fitted.apply_to(model)
    same_weights(
        model.merge_and_unload(),
        moved(base, fitted, {}, {"model.embed_tokens": torch.arange(48)}),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_merged_checkpoint_is_the_whole_change(made, tmp_path) -> None:
    base, _, fitted = made
    base.save_pretrained(tmp_path / "base")
    fitted.merge(tmp_path / "base", tmp_path / "merged")
    model = type(base).from_pretrained(tmp_path / "merged")
    same_weights(model, moved(base, fitted), rtol=1e-6, atol=1e-7)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
        base.lm_head.weight is base.get_input_embeddings().weight
    )
    fitted.add_to_(base)
    same_weights(model, base, rtol=0, atol=0)


def test_a_checkpoint_in_several_files(llama, tmp_path) -> None:
    base, fitted = llama
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    fitted.merge(tmp_path / "base", tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    same_weights(type(base).from_pretrained(tmp_path / "merged"), moved(base, fitted), rtol=1e-6, atol=1e-7)


def test_a_file_holds_everything(made, tmp_path) -> None:
    _, _, fitted = made
    path = tmp_path / "fitted.safetensors"
    fitted.save(path)
    again = FittedTransfer.load(path)
    assert again.record == fitted.record
    assert list(again.modules) == list(fitted.modules)
    for name, module in fitted.modules.items():
        other = again.modules[name]
        assert (other.names, other.kind, other.fingerprint) == (module.names, module.kind, module.fingerprint)
        for part in ("delta", "bias", "gains", "directions", "strengths", "token_metric", "token_weights"):
            mine, theirs = getattr(module, part), getattr(other, part)
            assert (mine is None) == (theirs is None)
            assert mine is None or (torch.equal(mine, theirs) and mine.dtype == theirs.dtype)
    assert again.gains == fitted.gains
    again.save(tmp_path / "second.safetensors")
    assert (tmp_path / "second.safetensors").read_bytes() == path.read_bytes()


def test_existing_rows_are_filled(made) -> None:
    base, _, fitted = made
    mask = fitted.gains.top(0.3, scope="module")
    name = next(iter(fitted.token_gains))
    config = ActConfig(channels=mask, trainable_token_indices={name: [3, 8]}, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    fitted.apply_to(model)
    expected = moved(base, fitted, dict(mask), {name: torch.tensor([3, 8])})
    ids = ABILITY[0]["input_ids"]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_learned_scales_start_at_one(llama) -> None:
    base, fitted = llama
    mask = ChannelMask({"model.layers.0.mlp.up_proj": [1, 4]}, {"model.layers.0.mlp.up_proj": 24})
    model = get_peft_model(copy.deepcopy(base), ActConfig(channels=mask, trainable="scales", task_type="CAUSAL_LM"))
    fitted.apply_to(model)
    same_weights(model.merge_and_unload(), moved(base, fitted, dict(mask), {}), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_autocast_changes_nothing(made, tmp_path) -> None:
    """It rounds products to its own dtype and keeps casts of weights, which must not outlive a change."""
    base, _, fitted = made
    ids, autocast = ABILITY[0]["input_ids"], lambda: torch.autocast("cpu", torch.bfloat16)
    config = ActConfig(channels=fitted.gains.top(0.3, scope="module"), task_type="CAUSAL_LM")
    for build, fill in (
        (lambda: copy.deepcopy(base), fitted.add_to_),
        (lambda: get_peft_model(copy.deepcopy(base), config), fitted.apply_to),
        (lambda: get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])), fitted.apply_to),
    ):
        model, expected = build(), build()
        expected.load_state_dict(model.state_dict())
        fill(expected)
        with autocast():
            before = model(ids).logits
            fill(model)
            found = model(ids).logits
        with autocast():
            torch.testing.assert_close(found, expected(ids).logits, rtol=0, atol=0)
        assert not torch.equal(found, before)
        same_weights(model, expected, rtol=0, atol=0)
    fitted.to_lora(4, tmp_path / "plain", embedding_rank=4)
    cut = fitted.low_rank(4, embedding_rank=4)
    with autocast():
        fitted.to_lora(4, tmp_path / "within", embedding_rank=4)
        within = fitted.low_rank(4, embedding_rank=4)
    plain, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "within"))
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert all(torch.equal(within.modules[name].delta, module.delta) for name, module in cut.modules.items())


@pytest.mark.parametrize("alpha", [4, 16])
def test_existing_factors_are_filled(made, alpha: int) -> None:
    base, _, fitted = made
    targets = [name for name, module in fitted.modules.items() if module.is_linear and name != "lm_head"]
    conv1d = {"fan_in_fan_out": True} if base.config.model_type == "gpt2" else {}
    config = LoraConfig(target_modules=targets, r=4, lora_alpha=alpha, task_type="CAUSAL_LM", **conv1d)
    model = get_peft_model(copy.deepcopy(base), config)
    fitted.apply_to(model)
    merged = model.merge_and_unload()
    for name in targets:
        module = fitted.modules[name]
        left = module.directions[:, :4]
        best = left @ left.T @ module.delta
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        change = change.T if module.kind.channel_dim == 1 else change
        torch.testing.assert_close(change.detach(), best, rtol=1e-3, atol=1e-5)


def test_whole_modules_are_filled(llama) -> None:
    base, fitted = llama
    config = LoraConfig(target_modules=["q_proj"], r=16, modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    fitted.apply_to(model)
    merged = model.merge_and_unload()
    for name, module in fitted.modules.items():
        if module.kind.is_norm:
            expected = base.get_submodule(name).weight + module.delta[:, 0]
            torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_gains_select_what_gains_most(llama) -> None:
    _, fitted = llama
    mask = fitted.gains.top(0.5, scope="module")
    for name, index in mask.items():
        gains = fitted.modules[name].gains
        rest = torch.ones(len(gains), dtype=torch.bool)
        rest[index] = False
        assert float(gains[index].min()) >= float(gains[rest].max())
    assert "keep_weight 1, ridge 0.03" in repr(fitted)
    assert "by gain" in repr(fitted.gains)
    with pytest.raises(ActValueError, match="scores by weight and gains are no means over tokens"):
        _ = fitted.gains + fitted.gains


def test_a_fit_of_embeddings_alone_has_no_gains_of_channels() -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP, target_modules=["embed_tokens"])
    with pytest.raises(ActValueError, match="gains: only embeddings were fitted"):
        _ = fitted.gains
    assert set(fitted.token_gains) == {"model.embed_tokens"}


MANY = {"model.layers.0.mlp.up_proj": 24}


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (3, ActTypeError, "mask: got int, expected a ChannelMask, a dict or the path of a mask"),
        ({"w_proj": [1]}, ActValueError, "w_proj: is no fitted module, expected one of 21"),
        ({"up_proj": [24]}, ActValueError, "up_proj: got channel 24"),
        ({"up_proj": []}, ActValueError, "mask: selects no channel, expected at least one"),
        ({"embed_tokens": [1]}, ActValueError, "embed_tokens: moves by rows of tokens, not by channels"),
        (
            ChannelMask({"model.norm": [1]}, {"model.norm": 3}),
            ActValueError,
            r"model\.norm: the mask has 3 channels, the fitted module 16",
        ),
    ],
)
def test_masks_that_do_not_fit(llama, tmp_path, mask, error, message) -> None:
    _, fitted = llama
    with pytest.raises(error, match=message):
        fitted.to_adapter(mask, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (True, ActTypeError, "tokens: got True, expected a share from 0 to 1, a list of tokens, or None"),
        (7, ActTypeError, "tokens: got 7, expected a share"),
        ("all", ActTypeError, "tokens: got 'all', expected a share"),
        (1.5, ActValueError, "tokens: got 1.5, expected a number from 0 to 1"),
        ([48], ActValueError, "embed_tokens: got channel 48"),
    ],
)
def test_tokens_that_do_not_fit(llama, tmp_path, tokens, error, message) -> None:
    _, fitted = llama
    with pytest.raises(error, match=message):
        fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter", tokens=tokens)


def test_tokens_without_an_embedding(tmp_path) -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP, target_modules=["q_proj"])
    with pytest.raises(ActValueError, match="tokens: got some, but no embedding was fitted"):
        fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter", tokens=[1])
    fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter", tokens=0.5)
    assert "token_adapter" not in str(list(load_file(tmp_path / "adapter" / "adapter_model.safetensors")))


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ActValueError, "rank: got 0, expected an integer of at least 1"),
        (1.5, ActTypeError, "rank: got 1.5, expected an integer of at least 1"),
        (5, ActValueError, "got rank 5, the fit kept 2 directions of it, expected at most as many"),
    ],
)
def test_ranks_that_do_not_fit(tmp_path, rank, error, message) -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP, max_rank=2)
    with pytest.raises(error, match=message):
        fitted.to_lora(rank, tmp_path / "lora")


def test_a_lora_of_no_linear_module(tmp_path) -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP, target_modules=["norm"])
    with pytest.raises(ActValueError, match="got a fit without linear modules"):
        fitted.to_lora(2, tmp_path / "lora")


def test_a_fit_without_directions_has_no_lora(tmp_path) -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP, max_rank=0)
    fitted.save(tmp_path / "fitted.safetensors")
    with pytest.raises(ActValueError, match="got rank 2, the fit kept 0 directions of it"):
        FittedTransfer.load(tmp_path / "fitted.safetensors").to_lora(2, tmp_path / "lora")


def test_models_without_the_adapter(llama) -> None:
    base, fitted = llama
    with pytest.raises(ActValueError, match="has no adapter 'default' of channels, low rank, tokens or whole modules"):
        fitted.apply_to(base)
    model = get_peft_model(copy.deepcopy(base), ActConfig(channels={"q_proj": [1]}, task_type="CAUSAL_LM"))
    with pytest.raises(ActValueError, match="has no adapter 'second'"):
        fitted.apply_to(model, adapter_name="second")
    with pytest.raises(ActValueError, match="q_proj: has an adapter, expected a model without"):
        fitted.add_to_(model)


def test_adapters_of_modules_that_were_not_fitted() -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP, target_modules=["q_proj"])
    model = get_peft_model(copy.deepcopy(base), ActConfig(channels={"k_proj": [1]}, task_type="CAUSAL_LM"))
    with pytest.raises(ActValueError, match="k_proj: has an adapter, but no fitted change"):
        fitted.apply_to(model)


def test_adapters_of_channels_of_an_embedding(llama) -> None:
    base, fitted = llama
    model = get_peft_model(copy.deepcopy(base), ActConfig(channels={"embed_tokens": [1]}, task_type="CAUSAL_LM"))
    with pytest.raises(ActValueError, match="embed_tokens: moves by rows of tokens, not by channels"):
        fitted.apply_to(model)


def test_dora_has_weights_of_its_own(llama) -> None:
    base, fitted = llama
    config = LoraConfig(target_modules=["q_proj"], r=2, use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ActValueError, match=r"q_proj: is a LoRA variant with weights of its own \(DoRA\)"):
        fitted.apply_to(get_peft_model(copy.deepcopy(base), config))


def test_models_of_other_shapes(llama, tmp_path) -> None:
    _, fitted = llama
    other = relatives("qwen2", dtype=torch.float32)[0]
    wide = type(other)(type(other.config)(**{**other.config.to_dict(), "intermediate_size": 32}))
    with pytest.raises(ActValueError, match=r"the model has a weight \[32, 16\], the transfer was fitted for"):
        fitted.add_to_(wide)
    model = get_peft_model(wide, ActConfig(channels={"up_proj": [1]}, task_type="CAUSAL_LM"))
    with pytest.raises(ActValueError, match="up_proj: the model has 32 channels, the transfer was fitted for 24"):
        fitted.apply_to(model)
    wide = type(other)(wide.config)
    model = get_peft_model(wide, LoraConfig(target_modules=["down_proj"], r=2, task_type="CAUSAL_LM"))
    with pytest.raises(ActValueError, match=r"down_proj: the adapter is for a weight \[16, 32\], the transfer was"):
        fitted.apply_to(model)
    clean = type(other)(type(other.config)(**{**other.config.to_dict(), "intermediate_size": 32}))
    clean.save_pretrained(tmp_path / "base")
    with pytest.raises(ActValueError, match=r"has a weight \[32, 16\], the transfer was fitted for a weight"):
        fitted.merge(tmp_path / "base", tmp_path / "merged")


def test_a_base_with_other_weights_is_warned_about(llama, tmp_path) -> None:
    base, fitted = llama
    with torch.no_grad():
        base.model.norm.weight.add_(0.1)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(ActWarning, match=r"has other weights than the base that was fitted: 1 modules differ"):
        fitted.merge(tmp_path / "base", tmp_path / "merged")
    with pytest.warns(ActWarning, match=r"has other weights than the base that was fitted.*model\.norm"):
        fitted.add_to_(base)


def test_merging_takes_a_path(llama, tmp_path) -> None:
    base, fitted = llama
    with pytest.raises(ActTypeError, match="base: got LlamaForCausalLM, expected the folder or Hub id"):
        fitted.merge(base, tmp_path / "merged")
    with pytest.raises(ActTypeError, match="base: got int, expected a model, or the folder or Hub id"):
        fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter", base=3)


def test_bases_that_lack_something(llama, tmp_path) -> None:
    base, fitted = llama
    with pytest.raises(
        ActValueError, match=r"q_proj: Linear has no such module, the transfer was fitted for a weight"
    ):
        fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter", base=nn.Linear(2, 2))
    biased, donor = relatives("qwen2", dtype=torch.float32)
    with pytest.raises(
        ActValueError, match=r"q_proj: LlamaForCausalLM has no bias, the transfer was fitted for a base"
    ):
        fit(biased, donor, ABILITY, KEEP).to_adapter({"q_proj": [0]}, tmp_path / "adapter", base=base)


def test_a_quantized_checkpoint(llama, tmp_path) -> None:
    base, fitted = llama
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, key: tensors[key].to(torch.int8)}, path, metadata={"format": "pt"})
    with pytest.raises(ActValueError, match=r"q_proj\.weight is torch\.int8, expected float64, float32"):
        fitted.merge(tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_embedding_without_its_metric(llama, tmp_path) -> None:
    _, fitted = llama
    name = "model.embed_tokens"
    damaged = {**fitted.modules, name: dataclasses.replace(fitted.modules[name], token_metric=None)}
    with pytest.raises(ActValueError, match=r"embed_tokens: has no metric of its tokens, expected one"):
        FittedTransfer(damaged, fitted.record).to_lora(2, tmp_path / "lora", embedding_rank=2)


def test_outputs_that_exist(llama, tmp_path) -> None:
    _, fitted = llama
    for _ in range(2):
        fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter", overwrite=True)
        fitted.to_lora(2, tmp_path / "lora", overwrite=True)
    with pytest.raises(ActValueError, match="adapter: exists, expected a new folder"):
        fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter")
    with pytest.raises(ActValueError, match="lora: exists, expected a new folder"):
        fitted.to_lora(2, tmp_path / "lora")


def test_a_model_that_went_away_is_no_base(llama, tmp_path) -> None:
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP)
    del base
    gc.collect()
    fitted.to_adapter({"q_proj": [0]}, tmp_path / "adapter")
    records = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["adapted_modules"]
    assert [entry["base"] for entry in records.values()] == [None, None]


def test_a_transfer_is_cut_to_a_rank(made, tmp_path) -> None:
    base, _, fitted = made
    low = fitted.low_rank(3, embedding_rank=2)
    assert list(low.modules) == list(fitted.modules)
    lost = fitted.to_lora(3, tmp_path / "lora", embedding_rank=2).errors
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, module in low.modules.items():
        whole = fitted.modules[name]
        if module.kind.is_norm:
            assert module is whole
            continue
        assert torch.linalg.matrix_rank(module.delta.double(), rtol=1e-4) <= (2 if module.is_embedding else 3)
        gained = float(module.gains.sum() / whole.gains.sum())
        assert gained == pytest.approx(1 - lost[name], abs=1e-5)
        assert bool((module.gains >= 0).all())
        if module.is_linear:
            a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            torch.testing.assert_close(module.delta, b @ a, rtol=1e-4, atol=1e-6)
    assert low.low_rank(3).to_lora(3, tmp_path / "again").error < 1e-9
    low.save(tmp_path / "low")
    assert FittedTransfer.load(tmp_path / "low").gains == low.gains
    assert fitted.low_rank(40).gains.keys() == fitted.gains.keys()
    with pytest.raises(ActValueError, match="embedding_rank: got 0, expected an integer of at least 1"):
        fitted.low_rank(3, embedding_rank=0)
    merged = copy.deepcopy(base)
    low.add_to_(merged)
    same_weights(merged, moved(base, low), rtol=1e-6, atol=1e-7)


def test_what_a_cut_row_gains_is_the_fall_of_the_objective() -> None:
    base, donor = relatives("llama")
    fitted = fit(base, donor, ABILITY, KEEP, ridge=0.2)
    name = "model.layers.1.mlp.down_proj"
    module, low = fitted.modules[name], fitted.low_rank(2).modules[name]
    metric = CollectedInputs(base, donor, ABILITY, KEEP)._moments.linear[name].metric(FitSettings(ridge=0.2)).matrix()
    rest = module.delta - low.delta
    torch.testing.assert_close(low.gains, module.gains - ((rest @ metric) * rest).sum(1))
