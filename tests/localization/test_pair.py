"""Adapters as donors, against two separate models in memory."""

from __future__ import annotations

import copy
import json
import re
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from act_peft import ActConfig, ActTypeError, ActValueError
from act_peft.channels.kinds import channel_kind
from act_peft.localization.pair import open_pair, twin
from act_peft.peft_modules import named_modules
from tests.support.pairs import localize_every

# An adapter beside its layer against the same adapter merged into the weight: sums round in another order.
MERGED = {"rtol": 1e-4, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # of PEFT

LORA = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], **LORA),
    "lora on embeddings": LoraConfig(target_modules=["embed_tokens", "lm_head", "v_proj"], **LORA),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"], **LORA),
    "a whole block saved": LoraConfig(target_modules=["q_proj"], modules_to_save=["1.mlp"], **LORA),
    "biases": LoraConfig(target_modules=["q_proj", "o_proj"], bias="all", **LORA),
    "dora": LoraConfig(target_modules=["q_proj"], use_dora=True, **LORA),
    "pissa": LoraConfig(target_modules=["q_proj"], **{**LORA, "init_lora_weights": "pissa"}),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], **LORA),
    "act": ActConfig(
        channels={"q_proj": [0, 5], "norm": [2], "embed_tokens": [1]}, init_weights=False, task_type="CAUSAL_LM"
    ),
}


def perturb(model, seed=3):
    """Change everything that an adapter trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def base(pair):
    return pair("qwen2")[0]


@pytest.fixture
def adapted(base):
    """A function that puts a trained adapter on a copy of the base."""

    def build(name="lora"):
        torch.manual_seed(5)
        return perturb(get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS[name])))

    return build


@pytest.fixture
def saved(adapted, tmp_path):
    """A function that saves such an adapter."""

    def save(name="lora"):
        adapted(name).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def merged_donor(base, folder):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()


def assert_close(got, expected):
    assert list(got) == list(expected)
    assert got.num_tokens == expected.num_tokens
    for name in got:
        torch.testing.assert_close(got[name], expected[name], **MERGED, msg=lambda text, name=name: f"{name}: {text}")


def everything(model):
    """What must come back: modules by identity, their attributes, hooks, tensors and flags."""
    kept = [repr(vars(model.config)) if hasattr(model, "config") else ""]
    for name, module in model.named_modules():
        switches = {"_active_adapter", "_disable_adapters"}  # PEFT's classes have them too, with these values
        kept.append((name, id(module), type(module), module.training, sorted(set(vars(module)) - switches)))
        kept.append([getattr(module, switch, None) for switch in ("active_adapters", "disable_adapters")])
        kept.append([list(hooks.items()) for hooks in (module._forward_hooks, module._forward_pre_hooks)])
        kept.append([(id(p), p.requires_grad, id(p.grad), p._version, p.data_ptr()) for p in module.parameters(False)])
    return kept, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    kept, tensors = everything(model)
    assert kept == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_folder_equals_two_models(name, base, saved, batches):
    folder = saved(name)
    base.train()
    base.model.norm.requires_grad_(False)
    base.model.norm.register_forward_hook(lambda *_: None)
    base.lm_head.weight.grad = torch.ones_like(base.lm_head.weight)
    before = everything(base)
    scores = localize_every(base, folder, batches)
    assert_same(base, before)
    assert not hasattr(base, "peft_config")
    expected = localize_every(base, merged_donor(base, folder), batches)
    assert max(float(values.max()) for values in expected.values()) > 1e-3
    assert_close(scores, expected)
    assert set(scores) == {name for name, module in base.named_modules() if channel_kind(module) is not None}


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"biases", "pissa"}))
@pytest.mark.parametrize("form", ["same", "base model", "base of both"])
def test_off_against_on_equals_two_models(name, form, base, adapted, batches):
    model = adapted(name)
    before = everything(model)
    passed = {"same": (model, model), "base model": (model.get_base_model(), model)}
    scores = localize_every(*passed.get(form, (model, model.get_base_model())), batches)
    assert_same(model, before)
    assert_close(scores, localize_every(base, copy.deepcopy(model).merge_and_unload(), batches))


def test_frozen_adapters_stay_frozen(adapted, batches):
    model = adapted()
    model.requires_grad_(False)
    before = everything(model)
    localize_every(model, model, batches)
    assert_same(model, before)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_the_base_comes_back_after_a_failure(error, base, saved, batches):
    def fail():
        yield batches[0]
        raise error

    folder = saved("modules_to_save")
    before = everything(base)
    with pytest.raises(type(error)):
        localize_every(base, folder, fail())
    assert_same(base, before)


def test_no_weight_is_held_twice(base, saved):
    _, donor = open_pair(base, saved(), merged=False)
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    extra = sum(p.numel() for p in donor.parameters() if p.data_ptr() not in pointers)
    assert extra == sum(p.numel() for name, p in donor.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("who", ["base", "donor", "both"])
def test_a_peft_model_with_another_model(who, pair, batches):
    base, donor = pair()
    plain = {"base": copy.deepcopy(base), "donor": copy.deepcopy(donor)}
    models = dict(plain)
    for role in ("base", "donor") if who == "both" else (who,):
        models[role] = perturb(get_peft_model(copy.deepcopy(plain[role]), copy.deepcopy(CONFIGS["lora"])))
        plain[role] = copy.deepcopy(models[role]).merge_and_unload()
    scores = localize_every(models["base"], models["donor"], batches)
    assert_close(scores, localize_every(plain["base"], plain["donor"], batches))
    for name, module in base.named_modules():
        if channel_kind(module) is not None:
            assert name in scores


def test_masks_fit_the_base(base, saved, batches):
    mask = localize_every(base, saved("act"), batches).top(0.2)
    model = get_peft_model(base, ActConfig(channels=mask, task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)


def test_names_are_narrowed_without_prefix(adapted, batches):
    model = adapted("modules_to_save")
    scores = localize_every(model, model, batches, target_modules=r"model\.layers\.0\.self_attn\.q_proj|lm_head")
    assert list(scores) == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert "lm_head" not in localize_every(model, model, batches, target_modules="all-linear")


@pytest.mark.parametrize("score", ["weight", "attribution"])
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"biases", "pissa", "tokens", "act"}))
def test_other_scores_merge_the_adapter(score, name, base, saved, adapted, batches):
    folder, data = saved(name), () if score == "weight" else (batches[:1],)
    before = everything(base)
    got = localize_every(base, folder, *data, score=score)
    assert_same(base, before)
    expected = localize_every(base, merged_donor(base, folder), *data, score=score)
    assert_close(got, expected)
    model = adapted(name)
    before = everything(model)
    assert_close(localize_every(model, model, *data, score=score), expected)
    assert_same(model, before)


def test_tied_weights_and_other_hooks_in_a_twin(pair):
    model = pair("gpt2")[0]
    hook = nn.ReLU()  # an object that a deep copy would double
    model.transformer.wte.register_forward_hook(lambda *_: hook)
    copied = twin(model)
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert copied.lm_head.weight is not model.lm_head.weight
    assert copied.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert list(copied.transformer.wte._forward_hooks.values()) == list(model.transformer.wte._forward_hooks.values())
    assert copied.state_dict().keys() == model.state_dict().keys()


def bind_forward(model):
    """Put a forward on the model that is bound to it by a closure."""
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)


@pytest.mark.parametrize("inner", [False, True])
def test_a_forward_that_is_bound_to_the_model(inner, base, saved, adapted, batches):
    folder = saved()
    expected = localize_every(base, folder, batches)
    model = adapted()
    for whole in (base, model.get_base_model()):
        bind_forward(whole.model.layers[1] if inner else whole)
    before = everything(model)
    assert_close(localize_every(model, model, batches), expected)
    assert_same(model, before)
    where = r"model\.layers\.1" if inner else "Qwen2ForCausalLM"
    message = rf"{where}: its forward was replaced .* expected a model as it was loaded, .*\(load it anew"
    for arguments in ((base, folder), (base, folder, "attribution"), (base, copy.deepcopy(base), "attribution")):
        before = everything(base)
        with pytest.raises(ActValueError, match=message):
            localize_every(*arguments[:2], batches, score=arguments[2] if len(arguments) > 2 else "activation")
        assert_same(base, before)


def method_forward(model):
    """Put a forward on the model that is a method of it, as TRL's trainers do."""
    plain = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: plain(self, *args, **kwargs), model)


@pytest.mark.parametrize("inner", [False, True])
def test_a_forward_that_is_a_method_follows_the_copy(inner, base, saved, batches):
    folder, donor = saved(), copy.deepcopy(base)
    with torch.no_grad():
        donor.model.layers[1].mlp.up_proj.weight.add_(0.1)
    expected = localize_every(base, folder, batches), localize_every(base, donor, batches, score="attribution")
    method_forward(base.model.layers[1] if inner else base)
    before = everything(base)
    assert_close(localize_every(base, folder, batches), expected[0])
    assert_close(localize_every(base, donor, batches, score="attribution"), expected[1])
    assert_same(base, before)


def test_the_base_of_a_peft_model_is_the_model_itself(adapted, batches):
    model = adapted("modules_to_save")
    off, on = open_pair(model, model, merged=False)
    assert on is model
    assert {id(p) for p in off.parameters()} == {id(p) for p in model.parameters()}
    with model.disable_adapter():
        expected = model(**batches[0]).logits
    assert torch.equal(off(**batches[0]).logits, expected)
    assert not torch.equal(on(**batches[0]).logits, expected)


def test_layers_that_were_off_stay_off(adapted, batches):
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    before = everything(model)
    scores = localize_every(model, model, batches)
    assert_same(model, before)
    assert layer.disable_adapters
    assert not scores["model.layers.0.self_attn.q_proj"].any()


def test_shared_modules_have_their_first_name():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    assert [name for name, _ in named_modules(model)] == [name for name, _ in model.named_modules()]


class TestRefused:
    def test_no_model(self, base):
        with pytest.raises(ActTypeError, match=r"base: got str, expected a torch.nn.Module \(load the model first\)"):
            localize_every("base", base, [])
        with pytest.raises(ActTypeError, match=r"donor: got int, expected a torch.nn.Module, or the folder or Hub id"):
            localize_every(base, 3, [])

    def test_a_whole_model(self, base, tmp_path):
        base.save_pretrained(tmp_path)
        with pytest.raises(ActValueError, match=r"donor: .* has no adapter_config.json, .* pass the model\)"):
            localize_every(base, tmp_path, [])

    def test_pickled_weights(self, base, saved):
        folder = saved()
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ActValueError, match=r"adapter_model.safetensors: no such file"):
            localize_every(base, folder, [])

    def test_an_adapted_base(self, adapted, saved):
        model = adapted()
        for passed in (model, model.get_base_model()):
            with pytest.raises(ActValueError, match=r"donor: .* is an adapter, but the base has adapters of its own"):
                localize_every(passed, saved(), [])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target_modules": ["nowhere"]}, r"cannot be loaded as an adapter of the base.*nowhere"),
            ({"peft_type": "SOMETHING"}, r"cannot be loaded as an adapter of the base"),
            ({"r": 5}, r"cannot be loaded as an adapter of the base(.|\n)*size mismatch"),
            ({"init_lora_weights": "olora"}, r"init_lora_weights='olora', expected another start"),
        ],
    )
    def test_adapters_that_do_not_fit(self, changes, message, base, saved):
        folder = saved()
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        before = everything(base)
        with pytest.raises(ActValueError, match=message):
            localize_every(base, folder, [])
        assert_same(base, before)

    def test_prompts(self, base, tmp_path):
        model = get_peft_model(copy.deepcopy(base), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path)
        with pytest.raises(ActValueError, match=r"adapter of type PROMPT_TUNING, expected one that changes modules"):
            localize_every(base, tmp_path, [])
        with pytest.raises(ActValueError, match=r"the PEFT model is of a type that changes no modules"):
            localize_every(model, model, [])

    def test_adapters_that_are_off(self, adapted):
        model = adapted()
        with (
            model.disable_adapter(),
            pytest.raises(ActValueError, match=r"has no active adapter, expected one \(call set_adapter"),
        ):
            localize_every(model, model, [])

    def test_merged_adapters(self, adapted):
        model = adapted()
        model.merge_adapter()
        with pytest.raises(ActValueError, match=r"has merged adapters, expected none \(call unmerge_adapter\(\)"):
            localize_every(model, model, [])

    def test_biases_that_cannot_be_switched_off(self, adapted):
        model = adapted("biases")
        with pytest.raises(ActValueError, match=r"has trained biases in adapter 'default', expected bias='none'"):
            localize_every(model, model, [])

    def test_adapters_without_their_peft_model(self, adapted, pair):
        inner = adapted().get_base_model()
        with pytest.raises(ActValueError, match=re.escape("Qwen2ForCausalLM: has adapters that cannot be merged")):
            localize_every(pair("qwen2")[0], inner, score="weight")
