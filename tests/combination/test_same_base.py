"""Adapters of different bases are noticed, and the result knows which base it is for."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from act_peft import ActConfig, ActLoadError, ActValueError, ActWarning, combine
from tests.support.tiny_checkpoints import save_relatives
from tests.support.tiny_models import build, build_relatives, random_mask

NO_ONE_BASE = "the adapters do not seem to belong to one base: "


def save(folder, model, channels, *, base="base"):
    config = ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return folder


def records(folder):
    return json.loads((folder / "adapter_config.json").read_text())["adapted_modules"]


def test_fingerprints_of_equal_channels_are_compared(tmp_path):
    base, other = build_relatives("llama")
    a = save(tmp_path / "a", base, {"up_proj": [1, 2], "down_proj": [1]})
    b = save(tmp_path / "b", other, {"up_proj": [1, 2], "down_proj": [2]})
    with pytest.warns(
        ActWarning,
        match=f"{NO_ONE_BASE}b was made .* other weights than that of a: 4 of 4 modules differ, .*",
    ):
        combine([a, b], tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def without_fingerprints(folder):
    """As an adapter of a quantized base, or of an older version."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for entry in config["adapted_modules"].values():
        entry |= {"base": None, "sample": None}
    path.write_text(json.dumps(config))


def test_fingerprints_decide_and_names_only_without_them(tmp_path):
    a = save(tmp_path / "a", build("llama"), {"up_proj": [1, 2]}, base="org/one")
    b = save(tmp_path / "b", build("llama"), {"up_proj": [1, 3]}, base="../one")
    c = save(tmp_path / "c", build("llama"), {"up_proj": [1, 3]}, base=None)
    d = save(tmp_path / "d", build("llama", seed=1), {"up_proj": [4]}, base="org/one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine([a, b, c], tmp_path / "fine")
    with pytest.warns(ActWarning, match=f"{NO_ONE_BASE}d was made for a base with other weights than that of a"):
        combine([a, d], tmp_path / "other")
    without_fingerprints(b)
    with pytest.warns(ActWarning, match=rf"{NO_ONE_BASE}they name different bases \(org/one, \.\./one\)") as caught:
        combine([a, b, c], tmp_path / "out")
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_without_the_base_a_fingerprint_is_known_where_an_adapter_has_all_channels(tmp_path):
    a = save(tmp_path / "a", build("llama"), {"up_proj": [1, 2, 5], "down_proj": [1]})
    b = save(tmp_path / "b", build("llama"), {"up_proj": [1, 5], "down_proj": [2]})
    combine([b, a], tmp_path / "out")
    found = records(tmp_path / "out")
    for name, record in records(a).items():
        expected = record["base"] if name.endswith("up_proj") else None
        assert found[name]["base"] == expected, name
        assert (found[name]["kind"], found[name]["channels"]) == (record["kind"], record["channels"])


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma"])
def test_with_the_base_all_fingerprints_are_those_of_memory(tmp_path, family):
    save_relatives(tmp_path, family)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, build(family), random_mask(build(family), 0.3, seed=seed), base=str(tmp_path / "base"))
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base")
    model = PeftModel.from_pretrained(build(family), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert records(tmp_path / "out") == model.peft_config["new"].adapted_modules


def test_a_base_with_other_weights_is_noticed(tmp_path):
    save_relatives(tmp_path, "llama")
    a = save(tmp_path / "a", build("llama"), {"up_proj": [1, 2], "norm": [1]})
    b = save(tmp_path / "b", build("llama"), {"up_proj": [0, 2]})
    with pytest.warns(
        ActWarning,
        match=r"a was made for a base with other weights than .*donor: 3 of 3 modules differ, the first is "
        r"model\.layers.*; b was made .*: 2 of 2 modules",
    ):
        combine([a, b], tmp_path / "out", base=tmp_path / "donor")


def refused(tmp_path, match, error):
    with pytest.raises(error, match=match):
        combine([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    save_relatives(tmp_path, "qwen2", shards=False)
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is written over
    save(tmp_path / "a", build("qwen2", intermediate_size=32), {"up_proj": [1]})
    refused(tmp_path, r"up_proj: size mismatch: .* has weight \[24, 16\], expected \[32, 16\]", ActLoadError)
    save(tmp_path / "a", build("qwen2", num_hidden_layers=3), {"up_proj": [1]})
    refused(tmp_path, r"model\.layers\.2\.mlp\.up_proj\.weight is missing in the checkpoint", ActValueError)
    save(tmp_path / "a", build("qwen2"), {"q_proj": [1]})
    for part in ("weight", "bias"):
        key = f"model.layers.0.self_attn.q_proj.{part}"
        save_file({**tensors, key: tensors[key].to(torch.int8)}, path)
        refused(tmp_path, f"{key} is torch.int8, expected float64, float32, float16 or bfloat16", ActValueError)
