"""Several adapters at once: sums in any order, scales, merging some of them, and the way back to the base's bytes."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale

from act_peft import ActConfig, ActValueError
from act_peft.layers import ActLayer
from tests.support.tiny_models import batch, build, random_mask, state_bytes

NAMES = ("default", "german", "maths")
pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")  # as meant here


def three_adapters(family, *, dtype=torch.float32):
    model = build(family, dtype=dtype, tie_word_embeddings=False)
    masks = [random_mask(model, 0.4, seed=seed) for seed in range(3)]
    tuned = get_peft_model(model, ActConfig(channels=masks[0], init_weights=False, task_type="CAUSAL_LM"))
    for name, mask in zip(NAMES[1:], masks[1:], strict=True):
        tuned.add_adapter(name, ActConfig(channels=mask, init_weights=False, task_type="CAUSAL_LM"))
    for parameter in (p for n, p in tuned.named_parameters() if "act_delta_" in n):
        parameter.data *= 0.1
    return tuned.eval()


def layers_of(tuned):
    return {n: m for n, m in tuned.get_base_model().named_modules() if isinstance(m, ActLayer)}


def summed(original, layer, scales):
    """Weight and bias with the scaled deltas added in float64, one channel after the other."""
    rows = original["weight"].double().movedim(layer.kind.channel_dim, 0).clone()
    bias = original["bias"].double().clone() if "bias" in original else None
    for name, scale in scales.items():
        delta = layer.act_delta_weight[name].detach().double().movedim(layer.kind.channel_dim, 0)
        for k, channel in enumerate(layer.act_delta_index[name].tolist()):
            rows[channel] += scale * delta[k]
            if bias is not None:
                bias[channel] += scale * layer.act_delta_bias[name][k].item()
    return rows.movedim(0, layer.kind.channel_dim), bias


def one_rounding(merged, exact, dtype):
    """Whether values are a float64 result rounded to float32 and once more to their dtype."""
    tolerance = {"rtol": 2.0**-7, "atol": 1e-6} if dtype is torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(merged.double(), exact, **tolerance)


def test_the_order_of_activation_does_not_matter(family):
    tuned = three_adapters(family)
    results = []
    for order in itertools.permutations(NAMES):
        tuned.base_model.set_adapter(list(order))
        results.append(tuned(batch()).logits)
    assert all(torch.equal(result, results[0]) for result in results)


def test_active_adapters_add_up_to_the_merged_weights(family, dtype):
    tuned = three_adapters(family, dtype=dtype)
    originals = {n: {k: t.clone() for k, t in m.base_layer.state_dict().items()} for n, m in layers_of(tuned).items()}
    before = state_bytes(tuned.get_base_model())
    scales = {"default": 1.0, "german": -0.5, "maths": 2.0}
    for name, scale in scales.items():
        tuned.set_scale(name, scale)
    tuned.base_model.set_adapter(list(NAMES))
    unmerged = tuned(batch()).logits
    tuned.merge_adapter()
    for name, layer in layers_of(tuned).items():
        weight, bias = summed(originals[name], layer, scales)
        one_rounding(layer.base_layer.weight.detach(), weight, dtype)
        if bias is not None:
            one_rounding(layer.base_layer.bias.detach(), bias, dtype)
    if dtype is torch.float32:
        torch.testing.assert_close(tuned(batch()).logits, unmerged, rtol=1e-3, atol=1e-3)
    tuned.unmerge_adapter()
    assert state_bytes(tuned.get_base_model()) == before


@pytest.mark.parametrize("seed", range(4))
def test_any_walk_of_merges_scales_and_unmerges_ends_at_the_base_s_bytes(family, seed):
    """Whatever is merged when, the weights are those of the merged set, and unmerging is exact."""
    tuned, choose = three_adapters(family, dtype=torch.bfloat16), random.Random(seed)
    before = state_bytes(tuned.get_base_model())
    originals = {n: {k: t.clone() for k, t in m.base_layer.state_dict().items()} for n, m in layers_of(tuned).items()}
    scales, merged = dict.fromkeys(NAMES, 1.0), []
    for _ in range(12):
        action = choose.choice(["merge", "merge", "scale", "unmerge", "disable"])
        left = [name for name in NAMES if name not in merged]
        if action == "merge" and left:
            chosen = choose.sample(left, choose.randint(1, len(left)))
            tuned.merge_adapter(chosen, safe_merge=choose.random() < 0.5)
            merged += chosen
        elif action == "scale":
            name = choose.choice(NAMES)
            scales[name] = choose.choice([0.0, -1.0, 0.5, 1.0, 3.0])
            tuned.set_scale(name, scales[name])
        elif action == "unmerge" and merged:
            tuned.unmerge_adapter()
            merged = []
        elif action == "disable":
            with tuned.disable_adapter():
                tuned(batch())
            merged = []
        for name, layer in layers_of(tuned).items():
            weight, _ = summed(originals[name], layer, {n: scales[n] for n in merged})
            one_rounding(layer.base_layer.weight.detach(), weight, torch.bfloat16)
        if not merged:
            assert state_bytes(tuned.get_base_model()) == before


def test_the_order_of_merging_does_not_matter():
    states = []
    for order in itertools.permutations(NAMES):
        tuned = three_adapters("qwen2", dtype=torch.bfloat16)
        for name in order:
            tuned.merge_adapter([name])
        states.append(state_bytes(tuned.get_base_model()))
    assert all(state == states[0] for state in states)


# -------------------------------------------------------------------------------------------------------- scales ---


def scale_layers(tuned, method, *args):
    """As diffusers does it with the layers of every PEFT method."""
    for layer in layers_of(tuned).values():
        getattr(layer, method)(*args)


@pytest.mark.parametrize("merged", [False, True])
def test_scale_layer_multiplies_what_is_active_and_unscale_layer_divides(merged):
    tuned = three_adapters("qwen2")
    reference = copy.deepcopy(tuned)
    for one in (tuned, reference):
        one.base_model.set_adapter(["default", "german"])
        one.set_scale("german", 0.5)
    before = tuned(batch()).logits
    if merged:
        tuned.merge_adapter()
    scale_layers(tuned, "scale_layer", 0.25)
    reference.set_scale("default", 0.25)
    reference.set_scale("german", 0.125)
    torch.testing.assert_close(tuned(batch()).logits, reference(batch()).logits, rtol=1e-4, atol=1e-4)
    scale_layers(tuned, "unscale_layer", 0.25)
    torch.testing.assert_close(tuned(batch()).logits, before, rtol=1e-4, atol=1e-4)
    scale_layers(tuned, "unscale_layer")
    reference.set_scale("default", 1.0)
    reference.set_scale("german", 1.0)
    torch.testing.assert_close(tuned(batch()).logits, reference(batch()).logits, rtol=1e-4, atol=1e-4)
    assert {layer.act_delta_scale["maths"] for layer in layers_of(tuned).values()} == {1.0}


def test_peft_s_own_context_manager_for_scales_is_for_lora():
    """It looks for LoRA's layers by their class and says so; `set_scale` and `scale_layer` do what it does."""
    with (
        pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(three_adapters("llama"), 0.5),
    ):
        pass


def test_impossible_factors_are_refused():
    layer = next(iter(layers_of(three_adapters("llama")).values()))
    with pytest.raises(ActValueError, match="unscale_layer: got 0, expected a factor other than 0"):
        layer.unscale_layer(0)
    with pytest.raises(ActValueError, match="got inf, expected a finite number"):
        layer.scale_layer(float("inf"))
    assert layer.act_delta_scale["default"] == 1.0


def test_deleting_the_only_active_adapter_activates_the_same_other_one_everywhere():
    base = build("llama")
    tuned = get_peft_model(copy.deepcopy(base), ActConfig(channels={"q_proj": [0, 3]}, init_weights=False))
    for name, module in (("one", "up_proj"), ("two", "q_proj")):
        tuned.add_adapter(name, ActConfig(channels={module: [1, 2]}, init_weights=False))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        tuned.delete_adapter("default")
    assert tuned.active_adapters == ["one"]
    for layer in layers_of(tuned).values():
        assert layer.active_adapters == ["one"]
    alone = get_peft_model(copy.deepcopy(base), ActConfig(channels={"up_proj": [1, 2]})).eval()
    deltas = {n.replace(".one", ".default"): t for n, t in tuned.state_dict().items() if n.endswith(".one")}
    alone.load_state_dict(deltas, strict=False)
    assert torch.equal(tuned.eval()(batch()).logits, alone(batch()).logits)
