"""Adapter files from strangers: every damaged one is refused with a clear error, and the base is as it was."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from act_peft import ActConfig, ActLoadError, ActValueError
from tests.support.tiny_models import batch, build, state_bytes

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(tmp_path):
    """A base and the folder of an adapter of it."""
    base = build("qwen2")
    fresh = copy.deepcopy(base)
    channels = {"q_proj": [0, 3, 15], "down_proj": [1], "embed_tokens": [2, 4], "norm": [5]}
    model = get_peft_model(base, ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return fresh, tmp_path / "adapter"


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_refused(base, folder, match, error=ActLoadError, **settings):
    before, structure = state_bytes(base), [n for n, _ in base.named_modules()]
    trained = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(base, folder, **settings)
    assert [p.requires_grad for p in base.parameters()] == trained
    assert "peft_config" not in vars(base)
    assert state_bytes(base) == before
    assert [n for n, _ in base.named_modules()] == structure


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value(tensors.get(key)))


DAMAGES = {
    "missing weight": (drop(f"{QUERY}.act_delta_weight"), "q_proj: the adapter has no act_delta_weight"),
    "missing index": (drop(f"{QUERY}.act_delta_index"), "q_proj: the adapter has no act_delta_index"),
    "missing bias": (drop(f"{QUERY}.act_delta_bias"), "q_proj: the adapter has no act_delta_bias"),
    "extra tensor": (
        put("base_model.model.extra", lambda _: torch.ones(2)),
        "extra: the adapter has a tensor of this name",
    ),
    "extra module": (
        put("base_model.model.model.layers.7.mlp.up_proj.act_delta_index", lambda _: torch.tensor([1])),
        "up_proj has tensors, expected an entry of it in adapted_modules too",
    ),
    "float index": (put(f"{QUERY}.act_delta_index", lambda t: t.float()), "channel indices are torch.float32"),
    "int32 index": (put(f"{QUERY}.act_delta_index", lambda t: t.int()), "channel indices are torch.int32"),
    "index of two dimensions": (put(f"{QUERY}.act_delta_index", lambda t: t[None]), r"of shape \[1, 3\]"),
    "negative index": (
        put(f"{QUERY}.act_delta_index", lambda _: torch.tensor([-1, 3, 15])),
        r"channel indices from -1 to 15, expected ascending ones in \[0, 16\)",
    ),
    "index out of range": (
        put(f"{QUERY}.act_delta_index", lambda _: torch.tensor([0, 3, 16])),
        "from 0 to 16, expected",
    ),
    "repeated index": (put(f"{QUERY}.act_delta_index", lambda _: torch.tensor([0, 3, 3])), "without repetition"),
    "unsorted index": (put(f"{QUERY}.act_delta_index", lambda _: torch.tensor([3, 0, 15])), "expected ascending"),
    "fewer channels": (
        put(f"{QUERY}.act_delta_index", lambda _: torch.tensor([0, 3])),
        "the adapter has 2 channels, expected 3",
    ),
    "integer weight": (put(f"{QUERY}.act_delta_weight", lambda t: t.int()), "act_delta_weight is torch.int32"),
    "wrong weight shape": (
        put(f"{QUERY}.act_delta_weight", lambda t: t[:, :5].contiguous()),
        "size mismatch for act_delta_weight",
    ),
    "wrong bias shape": (
        put(f"{QUERY}.act_delta_bias", lambda t: t[:2].contiguous()),
        "size mismatch for act_delta_bias",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused(saved, damage, low_cpu_mem_usage):
    base, folder = saved
    change, match = DAMAGES[damage]
    rewrite(folder, change)
    assert_refused(base, folder, match, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_damaged_second_adapter_leaves_the_first_in_place(saved):
    base, folder = saved
    model = PeftModel.from_pretrained(base, folder).eval()
    expected = model(batch()).logits
    rewrite(folder, DAMAGES["float index"][0])
    with pytest.raises(ActLoadError, match=r"channel indices are torch\.float32"):
        model.load_adapter(str(folder), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(batch()).logits, expected)
    rewrite(folder, put(f"{QUERY}.act_delta_index", lambda t: t.long()))
    model.load_adapter(str(folder), "second")


def test_a_pipe_in_the_place_of_the_tensors_is_not_waited_for(saved):
    base, folder = saved
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    assert_refused(base, folder, "is no regular file, expected a safetensors file")


@pytest.mark.parametrize("kept", [0, 4, 100, 2000])
def test_a_file_that_is_cut_off_is_refused(saved, kept):
    base, folder = saved
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(base, folder, r"adapter_model\.safetensors: got")


@pytest.mark.parametrize("selected", [10**12, -1, 17, True, 3.0, None])
def test_counts_in_the_configuration_are_checked_before_they_are_used(saved, selected):
    base, folder = saved
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["adapted_modules"]["model.layers.0.self_attn.q_proj"]["selected"] = selected
    path.write_text(json.dumps(config))
    assert_refused(
        base, folder, "adapted_modules: got .*'selected': .* for model.layers.0.self_attn.q_proj", ActValueError
    )


@pytest.mark.parametrize(
    "value", [3, [1], {"lm_head": 3}, {"lm_head": {"selected": 1, "base": 5}}, {"a": {"selected": "3"}}]
)
def test_a_malformed_record_of_modules_is_refused(saved, value):
    base, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapted_modules": value}))
    assert_refused(base, folder, "adapted_modules: got .*expected module name", ActValueError)


def test_a_file_where_a_folder_is_expected_is_refused(saved):
    base, folder = saved
    assert_refused(
        base, str(folder / "adapter_config.json"), "got a file, expected the adapter's folder|Can't find", ValueError
    )


def test_a_base_of_another_shape_is_refused(saved):
    _, folder = saved
    assert_refused(
        build("qwen2", hidden_size=32), folder, r"size mismatch for act_delta_weight: the adapter has \[3, 16\]"
    )


def test_a_base_without_the_modules_is_refused(saved):
    _, folder = saved
    assert_refused(build("gpt2"), folder, "matches no module of GPT2LMHeadModel", ActValueError)


def test_auto_classes_find_the_base(saved, tmp_path):
    base, folder = saved
    base.save_pretrained(tmp_path / "base")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(batch()).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.eval()(batch()).logits, expected)
    assert isinstance(PeftConfig.from_pretrained(folder), ActConfig)


def test_reloading_into_an_existing_adapter(saved):
    base, folder = saved
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    expected = model(batch()).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(str(folder), "default", is_trainable=True)
    assert torch.equal(model(batch()).logits, expected)
    rewrite(folder, DAMAGES["negative index"][0])
    with pytest.raises(ActLoadError, match="channel indices from -1"):
        model.load_adapter(str(folder), "default")
    assert torch.equal(model(batch()).logits, expected)
    assert "default" in model.peft_config
