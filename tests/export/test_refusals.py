"""What an export refuses: biases and norms, settings, damaged adapters; and what it leaves behind: nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from act_peft import ActConfig, ActLoadError, ActTypeError, ActValueError, export_lora
from act_peft.channels.masks import ChannelMask
from act_peft.export import folder, lora, plan
from tests.support.exports import (
    OUTER,
    QUERY,
    adapted,
    change_record,
    config_of,
    dense,
    layers_of,
    product,
    tensors_of,
)
from tests.support.tiny_models import DECODER, build

pytestmark = [
    # PEFT says so of every LoRA adapter of tied embeddings, and of GPT-2, whose layers are of both orientations.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]


# ------------------------------------------------------------------------------------------------ biases and norms ---


def test_biases_and_norms_are_named(tmp_path):
    model = adapted(build("qwen2"), biases=True, norms=True)
    with pytest.raises(ActValueError, match=r"layers\.0\.self_attn\.k_proj, .* and 3 more: deltas .*merge_checkpoint"):
        export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_deltas_that_are_zero_do_not_matter(tmp_path):
    model = adapted(build("qwen2"), norms=True, biases=True)
    for layer in layers_of(model).values():
        if layer.has_bias:
            layer.act_delta_bias["default"].data.zero_()
        if layer.kind.is_norm:
            layer.act_delta_weight["default"].data.zero_()
    result = export_lora(model, tmp_path / "lora")
    assert set(result.ranks) == {name for name, layer in layers_of(model).items() if not layer.kind.is_norm}


def test_lora_bias_without_biases_is_plain(tmp_path):
    export_lora(adapted(build("llama")), tmp_path / "lora", biases="lora_bias")
    assert config_of(tmp_path / "lora")["lora_bias"] is False


def test_lora_bias_is_exact(tmp_path):
    model = adapted(build("qwen2"), channels={"q_proj": [0, 3], "up_proj": [2]}, biases=True)
    export_lora(model, tmp_path / "lora", biases="lora_bias")
    tensors = tensors_of(tmp_path / "lora")
    expected = torch.zeros(16).index_copy(
        0, torch.tensor([0, 3]), layers_of(model)[QUERY].act_delta_bias["default"].detach()
    )
    assert torch.equal(tensors[f"{OUTER}{QUERY}.lora_B.bias"], expected)
    assert torch.equal(tensors[f"{OUTER}model.layers.0.mlp.up_proj.lora_B.bias"], torch.zeros(24))
    assert config_of(tmp_path / "lora")["lora_bias"] is True


@pytest.mark.parametrize(
    ("channels", "named"),
    [({"q_proj": [0], "embed_tokens": [1]}, "model.embed_tokens"), ({"q_proj": [0], "norm": [1]}, "model.norm")],
)
def test_lora_bias_is_for_linear_layers(channels, named, tmp_path):
    model = adapted(build("qwen2"), channels=channels, biases=True)
    with pytest.raises(ActValueError, match=f"{named}: biases='lora_bias' is only for linear layers"):
        export_lora(model, tmp_path / "lora", biases="lora_bias")


@pytest.mark.parametrize(("biases", "channels"), [("error", {"norm": [1]}), ("modules_to_save", {"q_proj": [1]})])
def test_something_must_be_left_for_lora(biases, channels, tmp_path):
    model = adapted(build("qwen2"), channels=channels, biases=True)
    if biases == "error":
        layers_of(model)["model.norm"].act_delta_weight["default"].data.zero_()
    with pytest.raises(ActValueError, match="no module is left for LoRA, expected at least one"):
        export_lora(model, tmp_path / "lora", biases=biases)


def test_whole_modules_whose_name_means_others_are_refused(tmp_path):
    base = nn.ModuleDict(
        {"proj": nn.Linear(4, 6), "other_proj": nn.Linear(4, 6), "plain": nn.Linear(4, 4, bias=False)}
    )
    mask = ChannelMask({"proj": [0], "plain": [1]}, {"proj": 6, "plain": 4})
    model = get_peft_model(base, ActConfig(channels=mask, init_weights=False))
    with pytest.raises(
        ActValueError, match="proj: cannot be saved as a whole, because PEFT would save other_proj too"
    ):
        export_lora(model, tmp_path / "lora", biases="modules_to_save")


# -------------------------------------------------------------------------------------------------------- refusals ---


OPTIONS = {
    "unknown target": (
        {"target": "tgi"},
        ActValueError,
        "target: got 'tgi', expected one of 'peft', 'vllm', ",
    ),
    "unknown choice": ({"biases": "drop"}, ActValueError, r"biases: got 'drop', expected one of 'error', 'lora_bias'"),
    "rank of zero": ({"max_rank": 0}, ActValueError, "max_rank: got 0, expected an integer of at least 1"),
    "rank of a half": ({"max_rank": 0.5}, ActTypeError, "max_rank: got 0.5, expected an integer"),
    "rank of truth": ({"max_rank": True}, ActTypeError, "max_rank: got True, expected an integer"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_can_never_be_right(saved, tmp_path, option):
    settings, error, match = OPTIONS[option]
    with pytest.raises(error, match=match):
        export_lora(saved[0], tmp_path / "lora", **settings)


def test_options_that_do_not_go_together(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ActValueError, match="base: got one together with a model in memory"):
        export_lora(model, tmp_path / "lora", base="base", biases="modules_to_save")
    with pytest.raises(ActValueError, match="adapter_name: got 'other' with a folder"):
        export_lora(folder, tmp_path / "lora", adapter_name="other")
    with pytest.raises(
        ActValueError, match="base: needed for biases='modules_to_save' of an adapter on disk, got none"
    ):
        export_lora(folder, tmp_path / "lora", biases="modules_to_save")
    with pytest.raises(ActValueError, match=r"^base: cannot be opened, expected a folder with a checkpoint"):
        export_lora(folder, tmp_path / "lora", base="base")
    for biases in ("lora_bias", "modules_to_save"):
        with pytest.raises(ActValueError, match=f"biases: got '{biases}' with target='vllm', expected 'error'"):
            export_lora(model, tmp_path / "lora", target="vllm", biases=biases)
    with pytest.raises(ActTypeError, match="export_lora: got int, expected a model with an ACT adapter"):
        export_lora(3, tmp_path / "lora")


def test_models_without_the_adapter_or_its_tensors(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ActValueError, match="has no ACT adapter 'other'"):
        export_lora(model, tmp_path / "lora", adapter_name="other")
    waiting = get_peft_model(build("llama"), ActConfig.from_pretrained(folder))
    with pytest.raises(ActValueError, match="adapter 'default': its tensors are not loaded, expected"):
        export_lora(waiting, tmp_path / "lora")


@pytest.mark.parametrize(
    ("part", "biases"),
    [(part, biases) for part in ("weight", "bias") for biases in ("lora_bias", "modules_to_save")]
    + [("norm", "modules_to_save")],
)
def test_deltas_that_are_not_finite_are_refused(part, biases, tmp_path):
    channels = {"q_proj": [0, 3], "up_proj": [1], **({"norm": [1]} if biases == "modules_to_save" else {})}
    model = adapted(build("qwen2"), channels=channels, biases=True)
    layers = layers_of(model)
    if part == "norm":
        broken = layers["model.norm"].act_delta_weight
    else:
        broken = layers[QUERY].act_delta_weight if part == "weight" else layers[QUERY].act_delta_bias
    broken["default"].data.flatten()[0] = math.nan
    with pytest.raises(ActValueError, match="the deltas hold NaN or infinity"):
        export_lora(model, tmp_path / "lora", biases=biases)
    assert list(tmp_path.iterdir()) == []


def put(key, value):
    return lambda entry: entry.__setitem__(key, value)


RECORDS = {
    "no channels": (lambda entry: entry.pop("channels"), "adapted_modules does not say how many channels it has"),
    "channels of another kind": (put("channels", "16"), "adapted_modules: got .*'channels': '16'"),
    "too few channels": (put("channels", 3), r"channel indices from 0 to 3, expected ascending ones in \[0, 3\)"),
    "unknown kind": (put("kind", "tensor"), "says it is a 'tensor', expected one of 'linear'.*upgrade act_peft"),
    "another kind": (put("kind", "embedding"), r"act_delta_weight: the adapter has \[2, 16\], expected \[any, 2\]"),
    "a norm": (put("kind", "RMS norm"), r"act_delta_weight: the adapter has \[2, 16\], expected \[2\]"),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_records_that_do_not_fit_the_tensors_are_refused(saved, tmp_path, damage):
    change, match = RECORDS[damage]
    change_record(saved[1], change, QUERY)
    with pytest.raises(ActValueError, match=match):
        export_lora(saved[1], tmp_path / "lora")


def test_channels_that_are_only_claimed_are_not_allocated(saved, tmp_path):
    change_record(saved[1], put("channels", 10**15), QUERY)
    with pytest.raises(ActValueError, match=r"the disk has .* GB free, expected at least"):
        export_lora(saved[1], tmp_path / "lora")


def test_square_deltas_of_unknown_kind_are_refused(tmp_path):
    model = adapted(build("llama"), channels={"q_proj": list(range(16))})
    model.save_pretrained(tmp_path / "act")
    export_lora(tmp_path / "act", tmp_path / "lora")
    change_record(tmp_path / "act", lambda entry: entry.pop("kind"))
    with pytest.raises(ActLoadError, match="does not say whether it is a linear or a embedding, and its delta is sq"):
        export_lora(tmp_path / "act", tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("task_type", "NONE_SUCH", r"adapter_config.json: cannot be used \(Invalid task type"),
        ("adapted_modules", 3, "adapted_modules: got 3"),
        ("adapted_modules", {QUERY: {"selected": 2, "kind": 3}}, "adapted_modules: got .*'kind': 3"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(saved, tmp_path, key, value, match):
    path = saved[1] / "adapter_config.json"
    path.write_text(json.dumps({**config_of(saved[1]), key: value}))
    with pytest.raises(ActValueError, match=match):
        export_lora(saved[1], tmp_path / "lora")


def test_a_base_of_another_shape_is_refused(tmp_path):
    build("qwen2", hidden_size=32).save_pretrained(tmp_path / "base")
    adapted(build("qwen2"), channels={"q_proj": [1], "up_proj": [2]}, biases=True).save_pretrained(tmp_path / "act")
    match = r"has a weight torch\.float32 \[32, 32\], expected plain numbers of shape \[16, 16\]"
    with pytest.raises(ActValueError, match=match):
        export_lora(tmp_path / "act", tmp_path / "lora", biases="modules_to_save", base=tmp_path / "base")


def test_a_tied_head_with_a_bias_is_saved_as_a_whole_from_the_checkpoint(tmp_path):
    settings = {"num_key_value_heads": 4, "tie_word_embeddings": True, "partial_rotary_factor": 0.5}
    config = PhiConfig(**{**DECODER, **settings})
    torch.manual_seed(0)
    base = PhiForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    model = adapted(base, channels={"lm_head": [1, 5], "q_proj": [2]})
    layers_of(model)["lm_head"].act_delta_bias["default"].data.fill_(0.5)
    model.save_pretrained(tmp_path / "act")
    from_memory = export_lora(model, tmp_path / "memory", biases="modules_to_save")
    from_disk = export_lora(tmp_path / "act", tmp_path / "disk", biases="modules_to_save", base=tmp_path / "base")
    assert from_disk.saved_modules == from_memory.saved_modules == ("lm_head",)
    expected = load_file(tmp_path / "memory" / "adapter_model.safetensors")
    found = load_file(tmp_path / "disk" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# --------------------------------------------------------------------------------------------- whole or not at all ---


def test_an_output_that_exists_is_refused(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ActValueError, match="expected a folder outside it"):
        export_lora(folder, folder / "lora")
    export_lora(model, tmp_path / "lora", max_rank=1)
    before = tensors_of(tmp_path / "lora")
    with pytest.raises(ActValueError, match=r"lora: exists, expected a new folder .*overwrite=True"):
        export_lora(model, tmp_path / "lora")
    assert tensors_of(tmp_path / "lora").keys() == before.keys()
    export_lora(model, tmp_path / "lora", overwrite=True)
    assert torch.equal(product(tensors_of(tmp_path / "lora"), QUERY), dense(layers_of(model)[QUERY]))


STEPS = {"tensors": (folder, "write_tensors"), "card": (lora, "card_text"), "factors": (plan, "factors")}


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_left_after_a_failure(saved, tmp_path, monkeypatch, step):
    model, _ = saved
    export_lora(model, tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(*STEPS[step], fail)
    for name in ("new", "lora"):
        with pytest.raises(ActValueError, match=f"{name}: cannot be written .*nothing was left behind"):
            export_lora(model, tmp_path / name, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["act", "lora"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before


def test_the_same_adapter_gives_the_same_bytes(saved, tmp_path):
    for name in ("a", "b"):
        export_lora(saved[0], tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
