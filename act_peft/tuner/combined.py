"""One adapter out of several adapters of a model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import nn

from act_peft.adapter.config import ActConfig
from act_peft.channels.names import matching_key
from act_peft.combination.combine import combined_settings, sources_in_model
from act_peft.combination.rules import Rule
from act_peft.combination.union import UnionModule, union_modules
from act_peft.errors import ActValueError
from act_peft.layers.lookup import base_model


def combined_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], rule: Rule
) -> tuple[ActConfig, dict[str, dict[str, torch.Tensor]]]:
    """Compute the combination of adapters of a model; the model stays as it is.

    Args:
        model: a model with adapters.
        adapters: names of its adapters.
        weights: a factor for each.
        rule: from `make_rule`.

    Returns:
        The configuration of the new adapter with its channels; module name -> "weight", "bias" -> delta.

    Raises:
        ActValueError, ActTypeError: as `ActModel.add_weighted_adapter`.
    """
    sources = sources_in_model(model, adapters, weights)
    modules = union_modules(sources)
    config = combined_settings(sources)
    config.channels = _channels_of(base_model(model), modules)
    return config, {module.name: module.combine(sources, rule, None) for module in modules}


def check_new_name(adapter_name: Any, known: Container[str]) -> None:
    """Check the name of a new adapter.

    Raises:
        ActValueError: no name, a name with dots, or the name of an adapter that the model has.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ActValueError(f"adapter_name: got {adapter_name!r:.80}, expected a name without dots")
    if adapter_name in known:
        raise ActValueError(
            f"adapter_name: got {adapter_name!r}, which the model has, expected a new name (delete_adapter removes "
            "the old one)"
        )


def _channels_of(model: nn.Module, modules: Sequence[UnionModule]) -> dict[str, torch.Tensor]:
    """The channels for `ActConfig`, in which a name also means the modules whose names end with it."""
    channels = {module.name: module.index for module in modules}
    others = {n for n, _ in model.named_modules() if n and n not in channels and matching_key(n, channels)}
    return {**channels, **dict.fromkeys(others, torch.empty(0, dtype=torch.int64))}
