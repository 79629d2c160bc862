"""Adapters that hold more than deltas: PEFT's settings that make them, on tiny models."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from act_peft import ActConfig
from tests.support.tiny_models import VOCABULARY, build

MORE = VOCABULARY + 6  # tokens of a resized vocabulary
ENDS = {"q_proj": [0, 2], "lm_head": [3, MORE - 1], "embed_tokens": [2, 5]}
# name -> (settings of ActConfig, whether the base has tied embeddings, whether its vocabulary is resized)
QUIET = (
    "ignore:Model (with|has) `tie_word_embeddings=True`",
    "ignore:Input and output embeddings are no longer tied",
    "ignore:Setting `save_embedding_layers` to `True`",
)
CASES = {
    "tokens": ({"trainable_token_indices": [11, 10]}, False, False),
    "tokens, tied": ({"trainable_token_indices": {"embed_tokens": [11, 10]}}, True, False),
    "tokens, resized": ({"trainable_token_indices": [10, MORE - 2]}, False, True),
    "tokens, resized, tied": ({"trainable_token_indices": [10, MORE - 2]}, True, True),
    "head": ({"modules_to_save": ["lm_head"]}, False, False),
    "head, tied": ({"modules_to_save": ["lm_head"]}, True, False),
    "embedding, tied": ({"modules_to_save": ["embed_tokens"]}, True, False),
    "both, resized": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False, True),
    "inner modules": ({"modules_to_save": ["norm", "o_proj"]}, False, False),
    "resized": ({"channels": ENDS}, False, True),
    "resized, tied": ({}, True, True),
    "resized, tied, channels": ({"channels": {"q_proj": [0], "lm_head": [3, MORE - 1]}}, True, True),
    "named embeddings": ({"channels": {**ENDS, "lm_head": [3]}, "target_modules": [*ENDS]}, False, False),
    "named embeddings, tied": ({"channels": {**ENDS, "lm_head": [3]}, "target_modules": [*ENDS]}, True, False),
}


def load_base(folder: Path, *, resized: bool) -> nn.Module:
    """The base of `save_case`."""
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    if resized:
        torch.manual_seed(3)
        base.resize_token_embeddings(MORE, mean_resizing=False)
    return base


def save_case(folder: Path, case: str, *, dtype: torch.dtype = torch.float32, size: str = "1GB") -> nn.Module:
    """Write `base` and the adapter `a`, as if it had been trained; the adapted model."""
    settings, tied, resized = CASES[case]
    build("llama", dtype=dtype, tie_word_embeddings=tied).save_pretrained(folder / "base", max_shard_size=size)
    config = ActConfig(**{"channels": {"q_proj": [0, 2]}, "task_type": "CAUSAL_LM", "init_weights": False, **settings})
    model = get_peft_model(load_base(folder / "base", resized=resized), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
    model.save_pretrained(folder / "a")
    return model
