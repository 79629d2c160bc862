"""What serving engines make of a LoRA folder, in a few lines each: names, scales and refusals as in their own code.

vLLM: `vllm/lora/peft_helper.py`, `lora_model.py`; SGLang: `srt/lora/lora_config.py`, `lora.py`; llama.cpp:
`convert_lora_to_gguf.py`, `llama-adapter.h`. Each returns module name -> what is added to the weight, `[O, I]`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def read(folder: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """The configuration, and module name -> "A" and "B"; anything else is refused, as all engines do."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        assert part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), f"{key} is unsupported"
        pairs.setdefault(module, {})[part[-1]] = tensor
    assert not config["use_dora"]
    assert not config["use_rslora"]
    return config, pairs


def vllm(folder: Path) -> dict[str, torch.Tensor]:
    """One scale for all modules; versions up to 0.30 do not look at the patterns."""
    config, pairs = read(folder)
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert config["r"] in VLLM_RANKS  # --max-lora-rank
    scale = config["lora_alpha"] / config["r"]
    return {name: scale * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def sglang(folder: Path) -> dict[str, torch.Tensor]:
    """One scale; patterns are refused; q, k, v and gate, up are stacked, and taken apart at multiples of r."""
    config, pairs = read(folder)
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        assert {key for key, value in config[field].items() if value != default} == set()
    scale, rank = config["lora_alpha"] / config["r"], config["r"]
    added = {}
    for name in list(pairs):
        parent, _, last = name.rpartition(".")
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if last == group[0]:
                parts = [pairs.pop(f"{parent}.{other}") for other in group]
                stacked = torch.cat([part["A"] for part in parts])  # [parts * r, I]
                for i, (other, part) in enumerate(zip(group, parts, strict=True)):
                    added[f"{parent}.{other}"] = scale * part["B"] @ stacked[i * rank : (i + 1) * rank]
    assert not [name for name in pairs if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))]
    return added | {name: scale * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def llama_cpp(folder: Path) -> dict[str, torch.Tensor]:
    """One alpha for all modules, divided by the columns of each B."""
    config, pairs = read(folder)
    return {name: config["lora_alpha"] / pair["B"].shape[1] * pair["B"] @ pair["A"] for name, pair in pairs.items()}


ENGINES = {"vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp}


def served(base: nn.Module, added: dict[str, torch.Tensor]) -> nn.Module:
    """The base with the products of an adapter in it; changed in place."""
    with torch.no_grad():
        for name, change in added.items():
            module = base.get_submodule(name)
            is_transposed = not isinstance(module, nn.Linear)  # Conv1D, and the embedding of PEFT's transposed factors
            module.weight = nn.Parameter(module.weight + (change.T if is_transposed else change))
    return base
