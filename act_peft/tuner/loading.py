"""Checks of an adapter that is loaded into a model, beyond those of one module (`adapter.state`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import nn

from act_peft.adapter.base_record import BaseComparison, recorded_base
from act_peft.adapter.config import ActConfig
from act_peft.errors import ActLoadError, ActWarning
from act_peft.layers import ActLayer
from act_peft.layers.lookup import record


def check_names(state_dict: Mapping[str, torch.Tensor], model: nn.Module, prefix: str) -> None:
    """Check that the model has every tensor of an adapter.

    Args:
        state_dict: the tensors that are about to be loaded.
        model: the base model with the layers in it.
        prefix: prefix of its names in `state_dict`.

    Raises:
        ActLoadError: it lacks a tensor.
    """
    known = {prefix + key for key in model.state_dict()}
    unknown = [key for key in state_dict if key not in known]
    if unknown:
        raise ActLoadError(
            f"{unknown[0]}: the adapter has a tensor of this name, the model does not ({len(unknown)} of "
            f"{len(state_dict)} tensors are not expected; the adapter was made for another model)"
        )


def check_base(
    config: ActConfig, adapter_name: str, layers: Mapping[str, ActLayer], indices: Mapping[str, torch.Tensor]
) -> None:
    """Compare the base rows with the fingerprints that the adapter has recorded.

    Args:
        config: the adapter's configuration.
        adapter_name: name of the adapter.
        layers: module name -> layer.
        indices: module name -> channels that were loaded, int64 `[K]`.

    Warns:
        ActWarning: once, if any differ.
    """
    comparison = BaseComparison(f"adapter {adapter_name!r}")
    for name, index in indices.items():
        comparison.add_(
            name, recorded_base(config.adapted_modules, name), partial(_base_of, layers[name], index, adapter_name)
        )
    note = comparison.note()
    if note is not None:
        warnings.warn(
            f"{note} (load it on {config.base_model_name_or_path or 'the base that it was trained on'}; on another "
            "model its channels may do nothing or harm)",
            ActWarning,
            stacklevel=3,
        )


def _base_of(layer: ActLayer, index: torch.Tensor, adapter_name: str) -> str | None:
    """Fingerprint of the layer's own base rows."""
    return cast("str | None", record(layer, index, include_bias=layer.changes_bias(adapter_name))["base"])
