"""Donors that cannot give anything to `build("llama")`, and what is said of them, in memory and on disk."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.tiny_models import build


def with_value(model: nn.Module, value: float) -> nn.Module:
    """The model with one weight filled with a value."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(value)
    return model


# what -> (how to make the donor, the message)
UNFIT_DONORS = {
    "another shape": (
        lambda: build("llama", intermediate_size=32),
        r"mlp\.gate_proj: donor has weight \[32, 16\], the base has weight \[24, 16\] .* tensors differ",
    ),
    "fewer layers": (
        lambda: build("llama", num_hidden_layers=1),
        r"model\.layers\.1\..*: donor has no weight, the base has weight",
    ),
    "more layers": (
        lambda: build("llama", num_hidden_layers=3),
        r"model\.layers\.2\..*: donor has weight .*, the base has no weight",
    ),
    "biases": (
        lambda: build("llama", attention_bias=True),
        r"_proj: donor has bias \[\d+\], the base has no bias",
    ),
    "another architecture": (
        lambda: build("qwen2"),
        "model_type: the donor's architecture is qwen2, the base's llama",
    ),
    "NaN": (
        lambda: with_value(build("llama"), float("nan")),
        r"layers\.1\.mlp\.up_proj: the donor's selected weights hold NaN",
    ),
    "infinity": (
        lambda: with_value(build("llama"), float("inf")),
        r"layers\.1\.mlp\.up_proj: the donor's selected weights hold NaN",
    ),
}
