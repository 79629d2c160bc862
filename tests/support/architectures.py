"""The table of architectures: one of each kind that transformers knows, as small as its configuration allows.

`python -m tests.support.architectures` writes its summary into `act_peft/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import act_peft
from tests.support.architecture_settings import (
    CLIP,
    DEEPSEEK,
    ENCODER,
    EXPERTS,
    LLAMA,
    MROPE,
    PIXTRAL,
    QWEN2_VISION,
    QWEN3_VISION,
    QWEN25_VISION,
    SEQ2SEQ,
    SHARED,
    SIGLIP,
    SIGLIP_HEAD,
    T5,
    TEXT,
    VISION,
    WAV,
)


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        kind: what it is, for the page.
        model: name of the model's class in transformers.
        config: name of the configuration's class.
        settings: for the configuration; a dict with `class` makes a configuration of a part.
        refused: end of a module's name -> a part of the sentence that refuses its channels.
        not_exported: ends of names of linear layers that a LoRA adapter has no factors for in stock PEFT.
        fast: whether it is tried in every run of the tests.
    """

    kind: str
    model: str
    config: str
    settings: Mapping[str, Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    not_exported: tuple[str, ...] = ()
    fast: bool = False

    @property
    def model_class(self) -> type[nn.Module]:
        return getattr(transformers, self.model)

    def build(self, seed: int) -> nn.Module:
        """A model with random weights that are far enough from zero."""
        torch.manual_seed(seed)
        model = self.model_class(_made(self.config, self.settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model


def _made(config_class: str, settings: Mapping[str, Any]) -> Any:
    made = {
        name: _made(value["class"], {k: v for k, v in value.items() if k != "class"})
        if isinstance(value, Mapping) and "class" in value
        else value
        for name, value in settings.items()
    }
    return getattr(transformers, config_class)(**made)


def _causal(name: str, settings: Mapping[str, Any] = TEXT, **more: Any) -> Architecture:
    fast = more.pop("fast", False)
    refused = more.pop("refused", {})
    kind = more.pop("kind", "causal")
    not_exported = more.pop("not_exported", ())
    return Architecture(
        kind, f"{name}ForCausalLM", f"{name}Config", {**settings, **more}, refused, not_exported, fast=fast
    )


ARCHITECTURES = [
    # --- causal
    _causal("Llama", fast=True),
    _causal("Qwen2", tie_word_embeddings=True, fast=True),
    _causal("Qwen3"),
    _causal("Mistral"),
    _causal("Phi", ENCODER),
    _causal("Phi3"),
    _causal("Gemma", fast=False),
    _causal("Gemma2"),
    Architecture("causal", "Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "sliding_window": 16}),
    _causal("Cohere"),
    _causal("Olmo2"),
    _causal("Granite"),
    _causal("StableLm", TEXT),
    _causal("Starcoder2"),
    _causal("GPTNeoX", ENCODER, fast=True),
    _causal("GPTJ", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    Architecture(
        "causal",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    _causal("OPT", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    _causal("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    _causal("Falcon", {k: v for k, v in ENCODER.items() if k != "head_dim"}),
    # --- mixtures of experts
    _causal("Mixtral", kind="mixture", num_local_experts=4, fast=True),
    _causal("Qwen2Moe", kind="mixture", **EXPERTS, shared_expert_intermediate_size=16),
    _causal("Qwen3Moe", kind="mixture", **EXPERTS),
    _causal("Phimoe", kind="mixture", num_local_experts=4),
    _causal("Olmoe", kind="mixture", **EXPERTS),
    _causal("GraniteMoe", kind="mixture", num_local_experts=4),
    _causal("GptOss", kind="mixture", num_local_experts=4),
    _causal("DeepseekV3", DEEPSEEK, kind="mixture", not_exported=("gate_proj", "up_proj", "down_proj")),
    # --- state-space and recurrent
    _causal(
        "Mamba",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        kind="state-space",
        refused={"out_proj": "fused kernel"},
        fast=True,
    ),
    _causal(
        "Mamba2",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8, "head_dim": 8},
        kind="state-space",
        refused={"out_proj": "fused kernel"},
    ),
    _causal("RecurrentGemma", {**TEXT, "num_hidden_layers": 3, "lru_width": 32}, kind="state-space"),
    Architecture("state-space", "RwkvForCausalLM", "RwkvConfig", {**TEXT, "attention_hidden_size": 32}),
    # --- encoders
    Architecture("encoder", "BertForMaskedLM", "BertConfig", ENCODER, fast=True),
    Architecture("encoder", "RobertaForMaskedLM", "RobertaConfig", ENCODER),
    Architecture(
        "encoder",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    Architecture("encoder", "ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": 16}),
    Architecture(
        "encoder", "ModernBertForMaskedLM", "ModernBertConfig", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}
    ),
    Architecture("encoder", "DebertaV2ForSequenceClassification", "DebertaV2Config", ENCODER),
    Architecture("encoder", "EsmForMaskedLM", "EsmConfig", {**ENCODER, "mask_token_id": 3}),
    Architecture("encoder", "AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": 16}),
    Architecture("encoder", "NomicBertForMaskedLM", "NomicBertConfig", ENCODER, fast=True),
    Architecture("encoder", "GteForMaskedLM", "GteConfig", ENCODER),
    Architecture("encoder", "BertForPreTraining", "BertConfig", ENCODER),
    Architecture("encoder", "BertLMHeadModel", "BertConfig", {**ENCODER, "is_decoder": True}),
    # --- encoder-decoders
    Architecture("encoder-decoder", "T5ForConditionalGeneration", "T5Config", T5, SHARED, fast=True),
    Architecture("encoder-decoder", "MT5ForConditionalGeneration", "MT5Config", T5, SHARED),
    Architecture("encoder-decoder", "UMT5ForConditionalGeneration", "UMT5Config", T5, SHARED),
    Architecture("encoder-decoder", "BartForConditionalGeneration", "BartConfig", SEQ2SEQ, SHARED),
    Architecture("encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ, SHARED),
    Architecture(
        "encoder-decoder",
        "MarianMTModel",
        "MarianConfig",
        SEQ2SEQ,
        {**SHARED, "embed_positions": "computes its weight and never saves it"},
    ),
    # --- vision
    Architecture("vision", "ViTForImageClassification", "ViTConfig", VISION, fast=True),
    Architecture("vision", "DeiTForImageClassification", "DeiTConfig", VISION),
    Architecture("vision", "BeitForImageClassification", "BeitConfig", VISION),
    Architecture("vision", "Dinov2ForImageClassification", "Dinov2Config", VISION),
    Architecture(
        "vision",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**VISION, "use_swiglu_ffn": True},
    ),
    Architecture(
        "vision",
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
    ),
    Architecture(
        "vision",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    Architecture(
        "vision",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    Architecture(
        "vision",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**ENCODER, "projection_dim": 16},
            "vision_config": {**VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    # --- speech
    Architecture(
        "speech",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
    ),
    Architecture("speech", "Wav2Vec2ForCTC", "Wav2Vec2Config", WAV),
    Architecture("speech", "HubertForCTC", "HubertConfig", WAV),
    # --- vision-language and audio-language
    Architecture(
        "vision-language",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 60},
        fast=True,
    ),
    Architecture(
        "vision-language",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN2_VISION},
    ),
    Architecture(
        "vision-language",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN25_VISION},
    ),
    Architecture(
        "vision-language",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {**TEXT, **MROPE, "tie_word_embeddings": True},
            "vision_config": QWEN3_VISION,
            "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "vision-language",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": TEXT, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
        SIGLIP_HEAD,
    ),
    Architecture(
        "vision-language",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {"class": "GemmaConfig", **TEXT},
            "vision_config": SIGLIP,
            "image_token_index": 60,
            "projection_dim": 32,
        },
        SIGLIP_HEAD,
    ),
    Architecture(
        "vision-language",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": {"class": "MistralConfig", **TEXT}, "vision_config": PIXTRAL, "image_token_index": 60},
    ),
    Architecture(
        "vision-language",
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {"text_config": LLAMA, "vision_config": VISION, "image_token_id": 60},
    ),
    Architecture(
        "audio-language",
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "text_config": {"class": "Qwen2Config", **TEXT},
            "audio_config": {
                "class": "Qwen2AudioEncoderConfig",
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "num_mel_bins": 8,
                "max_source_positions": 32,
            },
            "audio_token_index": 60,
        },
    ),
    Architecture(
        "audio-language",
        "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechConfig",
        {
            "text_config": {"class": "GraniteConfig", **TEXT},
            "encoder_config": {
                "class": "GraniteSpeechEncoderConfig",
                "hidden_dim": 32,
                "num_layers": 2,
                "num_heads": 4,
                "dim_head": 8,
                "input_dim": 8,
                "output_dim": 32,
                "context_size": 8,
            },
            "projector_config": {
                "class": "Blip2QFormerConfig",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "encoder_hidden_size": 32,
                "vocab_size": 64,
            },
            "audio_token_index": 60,
            "has_lora_adapter": False,
        },
    ),
]


def by_name(model: str) -> Architecture:
    """The architecture of a model class."""
    return next(one for one in ARCHITECTURES if one.model == model)


# ------------------------------------------------------------------------------------------------------- the page ---

PAGE = Path(act_peft.__file__).parent / "README.md"
MARKS = ("<!-- architectures: begin -->\n", "<!-- architectures: end -->\n")


def summary() -> str:
    """The table as text in Markdown: kinds with their classes, and what is refused."""
    lines = ["| kind | classes that are tried |", "|---|---|"]
    for kind in dict.fromkeys(one.kind for one in ARCHITECTURES):
        classes = ", ".join(f"`{one.model}`" for one in ARCHITECTURES if one.kind == kind)
        lines.append(f"| {kind} | {classes} |")
    lines += ["", "| part that is refused | because it (is) | in |", "|---|---|---|"]
    reasons = dict.fromkeys(item for one in ARCHITECTURES for item in one.refused.items())
    for part, reason in reasons:
        classes = ", ".join(f"`{one.model}`" for one in ARCHITECTURES if one.refused.get(part) == reason)
        lines.append(f"| `{part}` | {reason} | {classes} |")
    return "\n".join(lines) + "\n"


def page_with_summary(page: str) -> str:
    """The page with the summary between the marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}{summary()}{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_summary(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
