"""Facts about a model from its `config.json` alone: its class, its ties, its modules without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.layout import Layout
from act_peft.disk.sizes import check_sizes, limited_parameters
from act_peft.errors import ActValueError

# For a configuration that names no class: the first of these that knows it.
_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModel)


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration of a checkpoint; no remote code is run.

    Raises:
        ActValueError: if transformers cannot read it or does not know the architecture, or for numbers that do not
            belong to the checkpoint.
    """
    if "auto_map" in checkpoint.config and "model_type" not in checkpoint.config:
        raise ActValueError(f"{checkpoint.location}: needs remote code, expected a model that transformers knows")
    check_sizes(checkpoint)
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False)
        parts = {type(part) for part in (config.get_text_config(), config.get_text_config(decoder=True))}
        if not all(issubclass(part, PretrainedConfig) for part in parts):
            raise TypeError(f"the part for text is a {parts.pop().__name__}")
    except Exception as error:  # a damaged configuration fails anywhere inside transformers
        raise ActValueError(
            f"{checkpoint.location}: config.json cannot be opened by transformers ({str(error)[:200]}), expected the "
            "configuration of a model that it knows"
        ) from error
    config._name_or_path = checkpoint.location
    return config


def build_skeleton(config: PretrainedConfig, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a configuration on the meta device: modules and shapes, no weights.

    Its class is the one that the configuration names (`architectures`), otherwise the one that transformers' automatic
    classes choose.

    Raises:
        ActValueError: if transformers cannot build it, or it is much larger than the checkpoint.
    """
    try:
        named = getattr(transformers, str(next(iter(config.architectures or ()), "")), None)
        with torch.device("meta"), limited_parameters(checkpoint):
            if isinstance(named, type) and issubclass(named, PreTrainedModel) and _is_of(named, config):
                return named(config)
            fitting = [auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping]
            return (fitting or [AutoModel])[0].from_config(config, trust_remote_code=False)
    except ActValueError:
        raise
    except Exception as error:  # a damaged configuration fails anywhere inside transformers
        raise ActValueError(
            f"{config._name_or_path}: transformers cannot build a model from config.json ({str(error)[:200]}), "
            "expected one of an architecture that it knows"
        ) from error


def _is_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    return isinstance(config, model_class.config_class or PretrainedConfig)


def layout_of(checkpoint: Checkpoint) -> Layout | None:
    """Where the parameters lie of the model that a checkpoint names; None if transformers cannot build this model."""
    found = _layout(checkpoint)
    return None if isinstance(found, ActValueError) else found


def check_ties_known(checkpoint: Checkpoint) -> None:
    """Check that it is known which parameters of a checkpoint are tied.

    Raises:
        ActValueError: transformers cannot build its model, and `config.json` does not say that nothing is tied.
    """
    found = _layout(checkpoint)
    if isinstance(found, ActValueError):
        configs = [checkpoint.config, checkpoint.config.get("text_config")]
        said = [c["tie_word_embeddings"] for c in configs if isinstance(c, Mapping) and "tie_word_embeddings" in c]
        if not said or any(said):
            raise found


def _layout(checkpoint: Checkpoint) -> Layout | ActValueError:
    if "layout" not in checkpoint.remembered:
        try:
            checkpoint.remembered["layout"] = Layout(build_skeleton(load_config(checkpoint), checkpoint), checkpoint)
        except ActValueError as error:
            checkpoint.remembered["layout"] = error
    return cast("Layout | ActValueError", checkpoint.remembered["layout"])
