"""Models with an adapter for the tests of exports, and what an export's folder holds."""

from __future__ import annotations

import json

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from act_peft import ActConfig
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.masks import ChannelMask
from act_peft.layers import ActLayer
from tests.support.tiny_models import random_mask

QUERY = "model.layers.0.self_attn.q_proj"
OUTER = "base_model.model."
# LoRA multiplies with two matrices and rounds elsewhere. In bfloat16 (8 bits, logits of up to 4) every layer rounds:
# the same adapter merged is up to 0.1 away from itself in float32. The deltas change the logits by far more, see
# `test_stock_peft_gives_the_same_logits`.
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 5e-6}, torch.bfloat16: {"rtol": 0.0, "atol": 2**-3}}


def layers_of(model: nn.Module) -> dict[str, ActLayer]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, ActLayer)}


def adapted(base: nn.Module, *, norms: bool = False, biases: bool = False, channels=None, **settings) -> PeftModel:
    """A model with random deltas, small enough for a tiny model; those of norms and biases only where asked for."""
    if channels is None:
        mask = random_mask(base, 0.4)
        kept = [n for n in mask if norms or base.get_submodule(n).weight.dim() == 2]
        channels = ChannelMask({n: mask[n] for n in kept}, {n: mask.num_channels[n] for n in kept})
    torch.manual_seed(0)
    config = ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config).eval()
    for layer in layers_of(model).values():
        layer.act_delta_weight["default"].data.mul_(0.15)
        if layer.changes_bias("default"):
            layer.act_delta_bias["default"].data.mul_(0.15 if biases else 0)
    return model


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """B @ A of one module, `[O, I]`."""
    embedding = f"{OUTER}{name}.lora_embedding_A"
    if embedding in tensors:
        return tensors[f"{OUTER}{name}.lora_embedding_B"] @ tensors[embedding]
    return tensors[f"{OUTER}{name}.lora_B.weight"] @ tensors[f"{OUTER}{name}.lora_A.weight"]


def dense(layer: ActLayer) -> torch.Tensor:
    """The delta of one module, `[O, I]`."""
    delta = layer.get_delta_weight("default")
    return delta.T if layer.kind in (ChannelKind.CONV1D, ChannelKind.EMBEDDING) else delta


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def change_record(folder, change, name=None) -> None:
    config = config_of(folder)
    for module, entry in config["adapted_modules"].items():
        if name in (None, module):
            change(entry)
    (folder / "adapter_config.json").write_text(json.dumps(config))
