"""What a model says about its quantization, and the message for weights that are not there because of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_peft.errors import ActValueError

_SETTINGS = ("quantization_config", "compression_config")  # the second is that of older compressed-tensors
_PARTS = ("", "text_config")


def quantization_method(config: Any) -> str | None:
    """The method that a model is quantized with, such as `"gptq"`; None if its configuration names none.

    Args:
        config: the content of a `config.json`, or a transformers configuration.
    """
    for part in _PARTS:
        own = _entry(config, part) if part else config
        settings = next((found for name in _SETTINGS if (found := _entry(own, name))), None)
        if settings is not None:
            method = _entry(settings, "quant_method")
            return str(getattr(method, "value", method) or "an unnamed method")[:40]
    return None


def quantized_weight(location: str, name: str, method: str) -> ActValueError:
    """The error for a parameter that a quantized model does not have as plain numbers.

    Args:
        location: of the model, for the message.
        name: of the parameter.
        method: as `quantization_method` names it.
    """
    return ActValueError(
        f"{location}: {name} is not there as plain numbers, because the model is quantized ({method}), expected the "
        "original one (take the model that this one was made from; an adapter can be merged into it and the result "
        "quantized again)"
    )


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
