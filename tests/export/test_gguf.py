"""An export for llama.cpp through its own file format: names, scale and the tensors that it reorders."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from act_peft import export_lora
from tests.support.engines import served
from tests.support.exports import OUTER, TOLERANCES, adapted
from tests.support.tiny_models import batch, build

gguf = pytest.importorskip("gguf", reason="the package gguf, llama.cpp's file format, is not installed")


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of the rows of q and k in llama.cpp: `LlamaModel.permute` of its converter."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def heads_of(name: str, model: nn.Module) -> int | None:
    config = model.config
    if name.endswith("q_proj"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj") else None


def convert(folder, path, model: nn.Module) -> None:
    """What `convert_lora_to_gguf.py` does with a Llama adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        is_a = ".lora_A.weight" in key or ".lora_embedding_A" in key
        is_b = ".lora_B.weight" in key or ".lora_embedding_B" in key
        assert is_a or is_b, f"Unexpected name '{key}'"
        module = key.removeprefix(OUTER).split(".lora_")[0]
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert name is not None, f"Can not map tensor '{module}'"
        heads = heads_of(module, model)
        if heads is not None and is_b:
            tensor = permuted(tensor, heads)
        if name == "token_embd.weight" and is_a:
            tensor = tensor.T.contiguous()
        writer.add_tensor(f"{name}.lora_{'a' if is_a else 'b'}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(path, model: nn.Module) -> dict[str, torch.Tensor]:
    """What `llama-adapter.cpp` makes of the file, under the names of the model."""
    reader = gguf.GGUFReader(path)
    assert bytes(reader.fields["general.type"].parts[-1]) == b"adapter"
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].parts[-1][0])
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".lora_")
        values = np.array(tensor.data).reshape([int(size) for size in reversed(tensor.shape)])
        pairs.setdefault(name, {})[part] = torch.from_numpy(values.astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    added = {}
    for module, plain in model.named_modules():
        if getattr(plain, "weight", None) is None:
            continue
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name not in pairs:
            continue
        pair = pairs.pop(name)
        a = pair["a"].T if name == "token_embd.weight" else pair["a"]
        change = alpha / pair["b"].shape[1] * pair["b"] @ a
        heads = heads_of(module, model)
        added[module] = change if heads is None else unpermuted(change, heads)
    assert pairs == {}, "does not exist in base model"
    return added


def test_a_gguf_file_gives_the_adapters_outputs(tmp_path):
    base = build("llama")
    fresh = copy.deepcopy(base)
    channels = {
        "q_proj": [0, 3, 9],
        "k_proj": [1],
        "down_proj": list(range(11)),
        "embed_tokens": [2],
        "lm_head": [4, 5],
    }
    model = adapted(base, channels=channels)
    export_lora(model, tmp_path / "lora", target="llama.cpp")
    convert(tmp_path / "lora", tmp_path / "lora.gguf", fresh)
    found = served(copy.deepcopy(fresh), loaded(tmp_path / "lora.gguf", fresh))(batch()).logits
    torch.testing.assert_close(found, model(batch()).logits, **TOLERANCES[torch.float32])
