"""The test matrix: tiny random models of four families, built from configs in milliseconds."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from act_peft.channels.kinds import channel_kind, num_channels
from act_peft.channels.masks import ChannelMask

VOCABULARY = 48
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# family -> (model class, configuration): Qwen2 has biases, GPT-2 Conv1D, LayerNorm and tied embeddings, Gemma 3 tied
# and scaled embeddings and RMS norms that multiply with 1 + weight
FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {**DECODER, "tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {**DECODER, "tie_word_embeddings": False}),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {**COMMON, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gemma": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {**DECODER, "head_dim": 4, "sliding_window": 16, "query_pre_attn_scalar": 4, "tie_word_embeddings": True},
    ),
}
DTYPES = (torch.float32, torch.bfloat16)


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """A tiny model of a family in evaluation mode, weights wide enough for outputs to depend on each of them."""
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def build_relatives(
    family: str, *, dtype: torch.dtype = torch.float32, **changes: object
) -> tuple[nn.Module, nn.Module]:
    """A base and a donor: the same ancestor, a tenth of noise apart."""
    base, donor = build(family, dtype=dtype, **changes), build(family, dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.02)
    return base, donor


def candidates(model: nn.Module) -> dict[str, int]:
    """Module name -> number of channels, for every module that has channels."""
    return {n: num_channels(m) for n, m in model.named_modules() if channel_kind(m) is not None}


def random_mask(model: nn.Module, density: float, *, seed: int = 0) -> ChannelMask:
    """A mask with this share of the channels of every module, at least one each."""
    generator = torch.Generator().manual_seed(seed)
    counts = candidates(model)
    channels = {
        name: torch.randperm(count, generator=generator)[: max(1, round(density * count))]
        for name, count in counts.items()
    }
    return ChannelMask(channels, counts)


def batch(*, rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids `[rows, length]`."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every parameter and buffer, by the name it has without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if "act_delta_" not in name
    }
