"""Adapters made on disk against those made in memory, byte by byte, and donors that do not fit."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from act_peft import ActConfig, ActTypeError, ActValueError, ActWarning, ChannelMask, create_adapter
from tests.support.tiny_checkpoints import SHARD_SIZE, save_relatives
from tests.support.tiny_models import batch, build
from tests.support.unfit_donors import UNFIT_DONORS, with_value

TIED = "Model with `tie_word_embeddings=True`"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_memory(base, donor, output, **settings):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = ActConfig(donor=str(donor), task_type="CAUSAL_LM", **settings)
    get_peft_model(model, config).save_pretrained(output)


@pytest.mark.filterwarnings(f"ignore:{TIED}")
@pytest.mark.parametrize("shards", [False, True])
def test_the_folder_holds_the_bytes_that_memory_gives(family, dtype, shards, tmp_path):
    save_relatives(tmp_path, family, dtype=dtype, shards=shards)
    base, donor = str(tmp_path / "base"), str(tmp_path / "donor")
    mask = ChannelMask.load(tmp_path / "mask")
    in_memory(base, donor, tmp_path / "memory", channels=mask, transfer_scale=0.7)
    create_adapter(base, donor, mask, tmp_path / "disk", transfer_scale=0.7)
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")
    assert len(contents(tmp_path / "disk")) == 3


@pytest.mark.parametrize("kind", ["path", "dict of suffixes"])
def test_channels_may_be_given_as_in_a_configuration(tmp_path, kind):
    save_relatives(tmp_path, "llama")
    base, donor = str(tmp_path / "base"), str(tmp_path / "donor")
    channels = str(tmp_path / "mask") if kind == "path" else {"up_proj": [3, 1], "lm_head": torch.tensor([5])}
    in_memory(base, donor, tmp_path / "memory", channels=channels)
    create_adapter(base, donor, channels, tmp_path / "disk")
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")


def test_peft_loads_the_result(tmp_path):
    save_relatives(tmp_path, "llama")
    mask = ChannelMask.load(tmp_path / "mask")
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "out", transfer_scale=1.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    rows = mask["lm_head"]
    torch.testing.assert_close(merged.lm_head.weight[rows], build_donor(tmp_path).lm_head.weight[rows])
    assert merged(batch()).logits.isfinite().all()


def build_donor(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "donor")


@pytest.mark.filterwarnings(f"ignore:{TIED}")
@pytest.mark.parametrize("donor_has", ["no head in its names", "a wrapper's names", "an untied head"])
def test_donors_with_other_keys_give_the_same_tensors(tmp_path, donor_has):
    family = "gemma" if donor_has == "an untied head" else "llama"
    save_relatives(tmp_path, family, shards=False)
    mask = ChannelMask.load(tmp_path / "mask")
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "expected")
    path = tmp_path / "donor" / "model.safetensors"
    tensors = load_file(path)
    if donor_has == "an untied head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config = json.loads((tmp_path / "donor" / "config.json").read_text())
        (tmp_path / "donor" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    else:
        prefix = "" if donor_has == "no head in its names" else "model.language_model."
        tensors = {prefix + n.removeprefix("model.") if n != "lm_head.weight" else n: t for n, t in tensors.items()}
        tensors["model.visual.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def refused(folder, match, error=ActValueError, mask=None, output="out", donor="donor", **settings):
    before = sorted(os.listdir(folder))
    mask = ChannelMask.load(folder / "mask") if mask is None else mask
    with pytest.raises(error, match=match):
        create_adapter(folder / "base", folder / donor, mask, folder / output, **settings)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("what", UNFIT_DONORS)
def test_donors_that_do_not_fit_are_refused(what, tmp_path):
    make, match = UNFIT_DONORS[what]
    save_relatives(tmp_path, "llama")
    shutil.rmtree(tmp_path / "donor")
    make().save_pretrained(tmp_path / "donor", max_shard_size=SHARD_SIZE)
    refused(tmp_path, match)


def test_large_finite_weights_are_no_infinity(tmp_path):
    save_relatives(tmp_path, "llama")
    shutil.rmtree(tmp_path / "donor")
    with_value(build("llama"), 1e30).save_pretrained(tmp_path / "donor")
    with pytest.warns(ActWarning, match="no common ancestor"):
        create_adapter(tmp_path / "base", tmp_path / "donor", {"up_proj": [1]}, tmp_path / "out")


def test_harmless_differences_and_strangers_are_one_warning(tmp_path):
    save_relatives(tmp_path, "llama")
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    build("llama", seed=7, rope_parameters=rope, max_position_embeddings=128).save_pretrained(tmp_path / "other")
    with pytest.warns(ActWarning) as caught:
        create_adapter(tmp_path / "base", tmp_path / "other", tmp_path / "mask", tmp_path / "out")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "rope_theta is 1000.0 in the donor and 10000.0 in the base" in message
    assert "max_position_embeddings is 128 in the donor and 64 in the base" in message
    assert "as if the models had no common ancestor" in message
    shutil.rmtree(tmp_path / "out")
    refused(tmp_path, "donor and base differ", ActWarning, donor="other")


def test_bad_arguments_are_refused(tmp_path):
    save_relatives(tmp_path, "llama")
    refused(tmp_path, "channels: got int", ActTypeError, mask=3)
    refused(tmp_path, "'q_proj2' matches no module", mask={"q_proj2": [1]})
    refused(tmp_path, "got channel 99, expected 0 to 23", mask={"up_proj": [99]})
    refused(tmp_path, "transfer_scale: got nan", transfer_scale=float("nan"))
    refused(tmp_path, "is, lies in or holds the input", output="base/out")
    refused(tmp_path, "exists, expected a new folder", output="mask")
    create_adapter(tmp_path / "base", tmp_path / "donor", {"up_proj": [1]}, tmp_path / "out")
    refused(tmp_path, "exists, expected a new folder")
    create_adapter(tmp_path / "base", tmp_path / "donor", {"up_proj": [2]}, tmp_path / "out", overwrite=True)


def test_a_base_that_is_not_what_its_configuration_says_is_refused(tmp_path):
    save_relatives(tmp_path, "llama", shards=False)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    refused(tmp_path, f"{key} is missing in the checkpoint")
    save_file({**tensors, key: tensors[key][:5]}, path)
    refused(tmp_path, rf"{key} has shape \[5, 16\], expected \[24, 16\] by its config.json")
    save_file({**tensors, key: tensors[key].to(torch.int8)}, path)
    refused(tmp_path, f"{key} is torch.int8, expected float64, float32, float16 or bfloat16 .*take the original one")


CONFIGS = {
    "an unknown architecture": ({"model_type": "unknown"}, "config.json cannot be opened by transformers"),
    "no architecture": ({"model_type": None}, "config.json cannot be opened by transformers"),
    "a class of a different model": ({"model_type": "t5"}, "matches no module of T5ForConditionalGeneration"),
    "another kind of value": ({"hidden_size": "many"}, "config.json cannot be opened|cannot build a model"),
    "code of its own": ({"model_type": None, "auto_map": {"AutoConfig": "x.Y"}}, "needs remote code"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_cannot_be_used_are_refused(tmp_path, what):
    changes, match = CONFIGS[what]
    save_relatives(tmp_path, "llama")
    for name in ("base", "donor"):
        path = tmp_path / name / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    refused(tmp_path, match)


def test_only_the_selected_rows_are_read(tmp_path, monkeypatch):
    from act_peft.disk.shard import Shard

    save_relatives(tmp_path, "llama")
    read = []
    real = Shard._map
    monkeypatch.setattr(Shard, "_map", lambda self, *a, **k: read.append(a[1] - a[0]) or real(self, *a, **k))
    create_adapter(tmp_path / "base", tmp_path / "donor", {"up_proj": [3, 4]}, tmp_path / "out")
    rows = 2 * 2 * 2 + 2 * 4  # two of both models in two layers, and a sample of four of the base
    assert sum(read) <= (rows + 2 * 24) * 16 * 4  # the sample is mapped from its first row to its last
