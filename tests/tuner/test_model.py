"""Creating adapters: what channels match, what is refused, and that a refusal leaves the model as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from act_peft import ActConfig, ActTypeError, ActValueError, ChannelMask
from act_peft.layers import ActLayer
from tests.support.tiny_models import batch, build, random_mask, state_bytes


def names(model) -> list[str]:
    return [name for name, _ in model.named_modules()]


def adapted_names(tuned) -> set[str]:
    return {n for n, m in tuned.get_base_model().named_modules() if isinstance(m, ActLayer)}


def assert_refused(model, config, error, match, **settings):
    before, structure = state_bytes(model), names(model)
    with pytest.raises(error, match=match):
        get_peft_model(model, config, **settings)
    assert state_bytes(model) == before
    assert names(model) == structure


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.conv = nn.Conv1d(2, 2, 1)
        self.clipped = nn.Embedding(5, 4, max_norm=1.0)

    def forward(self, x):
        return self.lin(x)


# ------------------------------------------------------------------------------------------------------- bad input ---


@pytest.mark.parametrize(
    ("channels", "settings", "error", "match"),
    [
        (None, {}, ActValueError, "channels: got none, expected a ChannelMask"),
        ({}, {}, ActValueError, "no channel of a module that may be adapted is selected"),
        ({"q_proj": []}, {}, ActValueError, "no channel of a module that may be adapted is selected"),
        ({"q_porj": [0]}, {}, ActValueError, r"channels: 'q_porj' matches no module .*1 of 1 names"),
        ({"q_proj": [16]}, {}, ActValueError, r"self_attn.q_proj: got channel 16, expected 0 to 15"),
        ({"mlp": [0]}, {}, ActTypeError, r"mlp: LlamaMLP is not supported, .*exclude_modules"),
        (
            {"q_proj": [0]},
            {"target_modules": ["v_proj"]},
            ValueError,
            "No modules were targeted|not found in the base",
        ),
        (
            {"q_proj": [0]},
            {"exclude_modules": ["q_proj"]},
            ActValueError,
            "no channel of a module that may be adapted",
        ),
    ],
)
def test_bad_channels_are_refused_and_nothing_changes(channels, settings, error, match):
    assert_refused(build("llama"), ActConfig(channels=channels, **settings), error, match)


def test_a_mask_of_another_model_is_refused():
    mask = ChannelMask({"lm_head": [0]}, {"lm_head": 999})
    assert_refused(
        build("llama"), ActConfig(channels=mask), ActValueError, "lm_head: the mask counts 999 channels, .* 48"
    )


@pytest.mark.parametrize(("name", "kind"), [("conv", "Conv1d"), ("clipped", "Embedding")])
def test_unsupported_layers_are_refused_by_name(name, kind):
    assert_refused(
        Toy(), ActConfig(channels={"lin": [0], name: [0]}), ActTypeError, f"{name}: {kind} is not supported"
    )


def test_the_fused_weights_of_mamba_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    assert_refused(
        model,
        ActConfig(channels={"out_proj": [0]}),
        ActValueError,
        "out_proj: cannot be adapted in the fused kernel of a mamba model",
    )


def test_a_folder_where_a_mask_is_expected_is_refused(tmp_path):
    assert_refused(build("llama"), ActConfig(channels=str(tmp_path)), ActValueError, str(tmp_path))


def test_a_second_adapter_that_is_refused_leaves_the_first_alone():
    model = get_peft_model(build("llama"), ActConfig(channels={"q_proj": [0, 1]}, init_weights=False)).eval()
    expected, structure = model(batch()).logits, names(model)
    with pytest.raises(ActValueError, match="got channel 99"):
        model.add_adapter("second", ActConfig(channels={"v_proj": [99]}))
    assert names(model) == structure
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(batch()).logits, expected)


def test_an_interruption_in_the_middle_unwraps_what_was_wrapped(monkeypatch):
    model = build("llama")
    structure, calls = names(model), []
    original = ActLayer.update_layer

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    monkeypatch.setattr(ActLayer, "update_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, ActConfig(channels={"q_proj": [0], "v_proj": [1]}))
    assert len(calls) == 3
    assert names(model) == structure


# ----------------------------------------------------------------------------------------------------- which modules
# ---


def test_names_match_exactly_or_as_dotted_suffix():
    model = get_peft_model(
        build("llama"),
        ActConfig(channels={"q_proj": [1], "model.layers.0.self_attn.q_proj": [3, 2], "1.mlp.up_proj": [0]}),
    )
    layers = {
        n: m.act_delta_index["default"].tolist()
        for n, m in model.get_base_model().named_modules()
        if isinstance(m, ActLayer)
    }
    assert layers == {
        "model.layers.0.self_attn.q_proj": [2, 3],
        "model.layers.1.self_attn.q_proj": [1],
        "model.layers.1.mlp.up_proj": [0],
    }


def test_a_suffix_never_matches_inside_a_name():
    with pytest.raises(ActValueError, match="'proj' matches no module"):
        get_peft_model(build("llama"), ActConfig(channels={"proj": [0]}))


def test_channels_outside_target_modules_are_left_aside():
    config = ActConfig(channels={"q_proj": [0], "no_such_module": [3]}, target_modules=["q_proj"])
    assert adapted_names(get_peft_model(build("llama"), config)) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj", "all-linear"])
def test_target_modules_narrow_a_mask(targets):
    model = build("llama")
    tuned = get_peft_model(model, ActConfig(channels=random_mask(model, 0.2), target_modules=targets))
    leaves = {name.rpartition(".")[2] for name in adapted_names(tuned)}
    attention, mlp = {"q_proj", "v_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert leaves == (attention | {"k_proj", "o_proj"} | mlp if targets == "all-linear" else attention)


def test_layers_to_transform_and_exclude_modules():
    model = build("llama")
    settings = {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["mlp.down_proj"]}
    tuned = get_peft_model(model, ActConfig(channels=random_mask(model, 0.2), **settings))
    assert all(name.startswith("model.layers.1.") for name in adapted_names(tuned))
    assert "model.layers.1.mlp.down_proj" not in adapted_names(tuned)
    assert "model.layers.1.mlp.up_proj" in adapted_names(tuned)


def test_modules_without_selected_channels_are_not_wrapped():
    tuned = get_peft_model(build("llama"), ActConfig(channels={"q_proj": [], "lm_head": [7]}))
    assert adapted_names(tuned) == {"lm_head"}


def test_one_configuration_serves_several_models_and_adapters(tmp_path):
    base = build("llama")
    config = ActConfig(channels=random_mask(base, 0.3), init_weights=False)
    get_peft_model(copy.deepcopy(base), config)
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("more", config)
    model.save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "more", "more")):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert torch.equal(loaded(batch()).logits, model(batch()).logits), name


def test_only_deltas_of_selected_channels_train():
    model = build("qwen2")
    mask = random_mask(model, 0.2)
    expected = 0
    for name, index in mask.items():
        module = model.get_submodule(name)
        expected += index.numel() * (module.weight.numel() // mask.num_channels[name])
        expected += index.numel() if getattr(module, "bias", None) is not None else 0
    tuned = get_peft_model(model, ActConfig(channels=mask))
    trained = {n: p.numel() for n, p in tuned.named_parameters() if p.requires_grad}
    assert all("act_delta_" in name for name in trained)
    assert sum(trained.values()) == expected


def test_modules_to_save_and_trainable_tokens(tmp_path):
    model = build("llama")
    fresh = copy.deepcopy(model)
    config = ActConfig(
        channels={"q_proj": [0, 3]},
        modules_to_save=["lm_head"],
        trainable_token_indices=[1, 5],
        init_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(batch()).logits, tuned(batch()).logits)


# ------------------------------------------------------------------------------------------------------ dtypes,
# copies ---


@pytest.mark.parametrize("autocast", [True, False])
def test_deltas_are_float32_by_the_autocast_rule_and_the_base_dtype_otherwise(autocast):
    model = build("llama", dtype=torch.bfloat16)
    tuned = get_peft_model(model, ActConfig(channels={"q_proj": [0]}), autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for n, p in tuned.named_parameters() if "act_delta_" in n}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}


def test_copies_and_pickles_work():
    tuned = get_peft_model(build("gemma"), ActConfig(channels={"q_proj": [0, 2]}, init_weights=False)).eval()
    expected = tuned(batch()).logits
    assert torch.equal(copy.deepcopy(tuned)(batch()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(tuned))(batch()).logits, expected)


def test_injection_without_a_peft_model():
    model = inject_adapter_in_model(ActConfig(channels={"q_proj": [0]}, init_weights=False), build("llama"))
    assert isinstance(model.model.layers[0].self_attn.q_proj, ActLayer)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's word for a second adapter
def test_transformers_own_adapter_methods(tmp_path):
    base = build("llama")
    plain = base(batch()).logits
    tuned = get_peft_model(
        copy.deepcopy(base), ActConfig(channels=random_mask(base, 0.2), init_weights=False, task_type="CAUSAL_LM")
    )
    expected = tuned.eval()(batch()).logits
    tuned.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(base(batch()).logits, expected)
    base.add_adapter(ActConfig(channels={"q_proj": [0]}, init_weights=False), adapter_name="added")
    base.set_adapter("added")
    assert not torch.equal(base(batch()).logits, expected)
    base.disable_adapters()
    assert torch.equal(base(batch()).logits, plain)
    base.enable_adapters()
    base.set_adapter("loaded")
    base.delete_adapter("added")
    assert torch.equal(base(batch()).logits, expected)


# ------------------------------------------------------------------------------------------------- scales and merging
# ---


def two_adapters():
    model = build("qwen2")
    tuned = get_peft_model(model, ActConfig(channels=random_mask(model, 0.2), init_weights=False))
    return tuned.eval()


@pytest.mark.parametrize("merged", [False, True])
def test_set_scale_multiplies_a_contribution(merged):
    tuned = two_adapters()
    plain = copy.deepcopy(tuned.get_base_model()).get_submodule("model.layers.0.mlp.up_proj")
    layer = tuned.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, layer.in_features)
    base, full = plain.base_layer(x), plain(x)
    if merged:
        tuned.merge_adapter()
    tuned.set_scale("default", -0.5)
    torch.testing.assert_close(layer(x), base - 0.5 * (full - base))
    tuned.set_scale("default", 1.0)
    torch.testing.assert_close(layer(x), full)


def test_set_scale_refuses_what_cannot_be():
    tuned = two_adapters()
    with pytest.raises(ActValueError, match="got adapter 'other', expected one of"):
        tuned.set_scale("other", 1.0)
    for scale, error in ((float("nan"), ActValueError), ("a", ActTypeError), (True, ActTypeError)):
        with pytest.raises(error, match=f"got {scale!r}, expected a finite number"):
            tuned.set_scale("default", scale)


def test_safe_merge_checks_every_layer_before_it_writes_any():
    tuned = two_adapters()
    before = state_bytes(tuned.get_base_model())
    last = [m for m in tuned.modules() if isinstance(m, ActLayer)][-1]
    last.act_delta_weight["default"].data[0] = float("nan")
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(
            ActValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
        ):
            merge(safe_merge=True)
        assert state_bytes(tuned.get_base_model()) == before


def test_merging_an_untied_copy_leaves_the_other_use_of_a_tied_weight_alone():
    model = build("gemma")
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    tuned = get_peft_model(model, ActConfig(channels={"lm_head": [3, 4]}, init_weights=False, task_type="CAUSAL_LM"))
    expected = tuned.eval()(batch()).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        tuned.merge_adapter()
    assert torch.equal(embedding, before)
    torch.testing.assert_close(tuned(batch()).logits, expected, rtol=1e-4, atol=1e-4)
    tuned.unmerge_adapter()
    head = tuned.get_base_model().lm_head.base_layer
    assert head.weight is embedding
