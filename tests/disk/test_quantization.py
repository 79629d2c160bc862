"""Checkpoints of every method that keeps weights in other tensors: the messages say quantized, and not broken."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from act_peft import (
    ActConfig,
    ActTypeError,
    ActValueError,
    combine,
    create_adapter,
    fit,
    initialize_from_donor,
    merge_checkpoint,
)
from act_peft.disk.quantization import quantization_method
from tests.support.tiny_checkpoints import save_relatives
from tests.support.tiny_models import batch, build, build_relatives

CHANNELS = {"q_proj": [0, 1]}


def ones(*shape, dtype):
    return torch.ones(shape).to(dtype)


# what a method makes of a weight [O, I]: end of the key -> tensor
METHODS = {
    "gptq": lambda o, i: {"qweight": ones(i // 8, o, dtype=torch.int32), "g_idx": ones(i, dtype=torch.int32)},
    "awq": lambda o, i: {"qweight": ones(i, o // 8, dtype=torch.int32), "scales": ones(1, o, dtype=torch.float16)},
    "compressed-tensors": lambda o, i: {"weight_packed": ones(o, i // 8, dtype=torch.int32)},
    "compressed int8": lambda o, i: {"weight": ones(o, i, dtype=torch.int8), "weight_scale": torch.ones(o, 1)},
    "fp8": lambda o, i: {"weight": ones(o, i, dtype=torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
    "bitsandbytes": lambda o, i: {"weight": ones(o * i // 2, 1, dtype=torch.uint8), "weight.absmax": torch.ones(4)},
    "hqq": lambda o, i: {"W_q": ones(o, i // 2, dtype=torch.uint8)},
    "spqr": lambda o, i: {"dense_weights": ones(o * i, dtype=torch.int64)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base and donor, an adapter of the base, and the base quantized by every method."""
    folder = tmp_path_factory.mktemp("quantized")
    save_relatives(folder, "llama", shards=False)
    create_adapter(folder / "base", folder / "donor", CHANNELS, folder / "adapter")
    for method, quantize in METHODS.items():
        tensors = load_file(folder / "base" / "model.safetensors")
        for key in [key for key in tensors if "proj" in key]:
            shape = tensors.pop(key).shape
            tensors |= {key.removesuffix("weight") + end: tensor for end, tensor in quantize(*shape).items()}
        shutil.copytree(folder / "base", folder / method)
        save_file(tensors, folder / method / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method.partition(" ")[0], "bits": 4}
        (folder / method / "config.json").write_text(json.dumps(config))
    return folder


def fitted_merge(folder, quantized, output):
    base, donor = build_relatives("llama")
    data = [{"input_ids": batch(), "attention_mask": torch.ones_like(batch())}]
    fit(base, donor, data, data, target_modules=["q_proj"]).merge(quantized, output)


STEPS = {
    "as base": lambda folder, it, out: create_adapter(it, folder / "donor", CHANNELS, out),
    "as donor": lambda folder, it, out: create_adapter(folder / "base", it, CHANNELS, out),
    "as donor of a model": lambda folder, it, out: get_peft_model(
        build("llama"), ActConfig(channels=CHANNELS, donor=str(it))
    ),
    "merging": lambda folder, it, out: merge_checkpoint(it, folder / "adapter", out),
    "combining": lambda folder, it, out: combine([folder / "adapter"] * 2, out, base=it),
    "merging a fit": fitted_merge,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_checkpoint_is_called_quantized(method, step, folder, tmp_path):
    with pytest.raises(ActValueError, match="quantized") as caught:
        STEPS[step](folder, folder / method, tmp_path / "output")
    assert "self_attn.q_proj" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("incomplete", "damaged", "another model"))
    assert list(tmp_path.iterdir()) == []


def test_the_message_names_the_method_and_the_way_out(folder, tmp_path):
    match = r"gptq: .*q_proj.weight is not there .* quantized \(gptq\), expected the original one"
    with pytest.raises(ActValueError, match=match):
        create_adapter(folder / "gptq", folder / "donor", CHANNELS, tmp_path / "a")


def test_what_is_not_quantized_of_a_quantized_checkpoint_can_be_used(folder, tmp_path):
    channels = {"lm_head": [3], "input_layernorm": [0]}
    create_adapter(folder / "base", folder / "donor", channels, tmp_path / "plain")
    create_adapter(folder / "gptq", folder / "donor", channels, tmp_path / "of it")
    merge_checkpoint(folder / "gptq", tmp_path / "plain", tmp_path / "merged")
    merged, before = (load_file(at / "model.safetensors") for at in (tmp_path / "merged", folder / "gptq"))
    assert {name for name in before if not torch.equal(before[name], merged[name])} == {
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    }


class PackedLinear(nn.Module):
    """As GPTQ's kernels hold a weight: no parameter of that name."""

    def __init__(self, plain):
        super().__init__()
        self.register_buffer("qweight", plain.weight.detach().to(torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T


def packed():
    model = build("llama")
    model.config.quantization_config = SimpleNamespace(quant_method=SimpleNamespace(value="gptq"))
    for layer in model.model.layers:
        layer.self_attn.q_proj = PackedLinear(layer.self_attn.q_proj)
    return model


def test_quantized_models_in_memory_say_so_too(folder):
    with pytest.raises(
        ActTypeError, match=r"q_proj: PackedLinear is not supported.* model is quantized \(gptq\): take"
    ):
        get_peft_model(packed(), ActConfig(channels=CHANNELS))
    model = get_peft_model(build("llama"), ActConfig(channels=CHANNELS))
    with pytest.raises(ActValueError, match=r"q_proj.weight is not there as plain numbers, .* quantized \(gptq\)"):
        initialize_from_donor(model, packed())


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": ["awq"]}, "an unnamed method"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"text_config": "broken"}, None),
    ],
)
def test_where_a_configuration_says_it(config, method):
    assert quantization_method(config) == method
