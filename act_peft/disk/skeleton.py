"""Facts about a model from its `config.json` alone: its class, its tied weights, its modules without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from act_peft.disk.checkpoint import Checkpoint
from act_peft.errors import ActValueError


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration of a checkpoint; no remote code is run.

    Raises:
        ActValueError: if transformers cannot read it, or does not know the architecture.
    """
    if "auto_map" in checkpoint.config and "model_type" not in checkpoint.config:
        raise ActValueError(f"{checkpoint.location}: needs remote code, expected a model that transformers knows")
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False)
    except Exception as error:  # a damaged configuration fails anywhere inside transformers
        raise ActValueError(
            f"{checkpoint.location}: config.json cannot be opened by transformers ({str(error)[:200]}), expected the "
            "configuration of a model that it knows"
        ) from error
    config._name_or_path = checkpoint.location
    return config


def tied_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter -> the parameter whose tensor it uses, for the causal language model of a checkpoint.

    Raises:
        ActValueError: if `config.json` does not say that nothing is tied, and `load_config` fails.
    """
    configs = [checkpoint.config, checkpoint.config.get("text_config")]
    said = [c["tie_word_embeddings"] for c in configs if isinstance(c, Mapping) and "tie_word_embeddings" in c]
    if said and not any(said):
        return {}
    config = load_config(checkpoint)
    if not getattr(config, "tie_word_embeddings", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}
    tied = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys
    return dict(tied) if isinstance(tied, dict) else {}


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration on the meta device: modules and shapes, no weights.

    Raises:
        ActValueError: if transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged configuration fails anywhere inside transformers
        raise ActValueError(
            f"{config._name_or_path}: transformers cannot build a causal language model from config.json "
            f"({str(error)[:200]}), expected one of an architecture that it knows"
        ) from error
