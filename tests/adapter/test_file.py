"""The folder of a saved adapter, read without a model."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from act_peft import ActLoadError, ActValueError
from act_peft.adapter.file import AdapterFolder
from act_peft.disk import locations
from tests.support.tiny_checkpoints import change_adapter, save_adapter
from tests.support.tiny_models import build, random_mask

HEAD = "base_model.model.lm_head."


def test_it_holds_the_channels_of_the_mask(tmp_path):
    save_adapter(tmp_path, "qwen2")
    mask = random_mask(build("qwen2"), 0.3)
    with AdapterFolder(tmp_path) as adapter:
        assert set(adapter.modules) == set(mask)
        for name, delta in adapter.modules.items():
            assert torch.equal(delta.index, mask[name])
            assert (delta.bias is not None) == name.endswith(("q_proj", "k_proj", "v_proj"))
            assert len(adapter.recorded_base(name)) == 16
        assert adapter.recorded_base("other") is None


def with_key(key, change):
    return lambda folder: change_adapter(folder, key, change)


def with_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


DAMAGES = {
    "another method": (with_config(peft_type="LORA"), "got an adapter of type LORA, expected ACT"),
    "record of another form": (with_config(adapted_modules={"lm_head": 3}), "adapted_modules: got .*damaged"),
    "settings of other types": (with_config(target_modules=3.5), "target_modules: got 3.5, expected a list of names"),
    "learned scales that are missing": (with_config(trainable="both"), "the adapter has no act_delta_channel_scale"),
    "learned scales that are not wanted": (
        with_key(HEAD + "act_delta_channel_scale", lambda _: torch.ones(14)),
        "lm_head: the adapter has act_delta_channel_scale, expected .* only",
    ),
    "rows without channels": (with_key(HEAD + "act_delta_index", lambda t: t[:0]), "the adapter has 0 channels"),
    "a module lost": (
        lambda f: [with_key(HEAD + f"act_delta_{part}", lambda _: None)(f) for part in ("index", "weight", "bias")],
        "records channels of lm_head, expected their tensors too",
    ),
    "a module more": (
        lambda f: [
            change_adapter(f, f"base_model.model.x.act_delta_{part}", lambda _, value=value: value)
            for part, value in (("index", torch.tensor([0])), ("weight", torch.ones(1, 3)))
        ],
        "x has tensors, expected an entry of it in adapted_modules too",
    ),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "a part of no module": (
        with_key("base_model.model.lm_head.extra", lambda _: torch.ones(3)),
        "got a tensor that is no channel delta, expected those of an ACT adapter",
    ),
    "whole integers": (with_key("base_model.model.lm_head.weight", lambda _: torch.arange(3)), "no channel delta"),
    "another prefix": (with_key("lm_head.act_delta_index", lambda _: torch.ones(3)), "no channel delta"),
    "no index": (with_key(HEAD + "act_delta_index", lambda _: None), "lm_head: the adapter has no act_delta_index"),
    "no weight": (with_key(HEAD + "act_delta_weight", lambda _: None), "lm_head: the adapter has no act_delta_weight"),
    "index of another dtype": (
        with_key(HEAD + "act_delta_index", lambda t: t.int()),
        r"channel indices are torch\.int32",
    ),
    "index of another shape": (with_key(HEAD + "act_delta_index", lambda t: t[None]), r"of shape \[1, 14\]"),
    "negative": (
        with_key(HEAD + "act_delta_index", lambda t: t - 100),
        "channel indices from -.*, expected ascending",
    ),
    "descending": (with_key(HEAD + "act_delta_index", lambda t: t.flip(0)), "expected ascending ones"),
    "integers": (with_key(HEAD + "act_delta_weight", lambda t: t.int()), r"act_delta_weight is torch\.int32"),
    "another bias": (
        with_key(HEAD + "act_delta_bias", lambda _: torch.ones(2)),
        r"size mismatch for act_delta_bias: the adapter has \[2\], expected \[14\]",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_adapters_are_refused(tmp_path, what):
    damage, match = DAMAGES[what]
    save_adapter(tmp_path)
    damage(tmp_path)
    with pytest.raises(ActValueError, match=match):
        AdapterFolder(tmp_path)
    assert issubclass(ActLoadError, ActValueError)


def test_an_adapter_without_a_record_has_no_fingerprints(tmp_path):
    save_adapter(tmp_path)
    with_config(adapted_modules=None)(tmp_path)
    with AdapterFolder(tmp_path) as adapter:
        assert adapter.recorded_base("lm_head") is None


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    save_adapter(tmp_path / "adapter")

    def download(name, *, revision, allow_patterns):
        if name != "org/name":
            raise LocalEntryNotFoundError("no such thing")
        return str(tmp_path / "adapter")

    monkeypatch.setattr(locations, "snapshot_download", download)
    with AdapterFolder("org/name") as adapter:
        assert "lm_head" in adapter.modules
    with pytest.raises(ActValueError, match=r"org/other: cannot be opened, .* an adapter .* or a Hub id"):
        AdapterFolder("org/other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ActValueError, match="got a file, expected a folder with an adapter"):
        AdapterFolder(tmp_path / "file")
