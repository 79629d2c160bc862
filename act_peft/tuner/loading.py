"""Checks of an adapter that is loaded into a model, beyond those of one module (`adapter.state`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from act_peft.adapter.base_record import BaseComparison, recorded_base
from act_peft.adapter.config import ActConfig
from act_peft.errors import ActLoadError, ActWarning
from act_peft.layers import ActLayer
from act_peft.layers.deltas import PREFIX
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
    # Beside a resized embedding PEFT saves some tensors of its wrappers a second time, under names that it ignores.
    wrappers = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    twice = tuple(f"{prefix}{name}.{part}." for name in wrappers for part in ("token_adapter", "modules_to_save"))
    unknown = [key for key in state_dict if key not in known and not key.startswith(twice)]
    if unknown:
        raise ActLoadError(
            f"{unknown[0]}: the adapter has a tensor of this name, the model does not ({len(unknown)} of "
            f"{len(state_dict)} tensors are not expected; the adapter was made for another model, or for names that "
            "modules had before: from_pretrained and load_adapter take key_mapping={old: new})"
        )


def check_whole(state_dict: Mapping[str, torch.Tensor], model: nn.Module, prefix: str) -> None:
    """Check that whole tensors beside the deltas, as embeddings of a resized vocabulary, have the model's shapes.

    Args:
        state_dict: as in `check_names`.
        model: likewise.
        prefix: likewise.

    Raises:
        ActLoadError: one has another shape.
    """
    known = model.state_dict()
    for key, tensor in state_dict.items():
        mine = known.get(key.removeprefix(prefix))
        if mine is not None and f".{PREFIX}" not in key and mine.shape != tensor.shape:
            raise ActLoadError(
                f"{key.removeprefix(prefix)}: size mismatch: the adapter holds a whole tensor {list(tensor.shape)}, "
                f"the model has {list(mine.shape)} (for an adapter of a base with another vocabulary call "
                f"model.resize_token_embeddings({len(tensor) if tensor.dim() else 0}) first)"
            )


def check_place_of_base(model: nn.Module, adapter_name: str) -> None:
    """Check that the base's weights are in memory, or were put elsewhere by hand.

    PEFT spreads a model that was loaded with `device_map` over the devices again after it has loaded an adapter. For
    what is on the disk it writes the checkpoint's files anew, in their own place if the checkpoint is a local folder.
    transformers' `load_adapter` leaves out the tensors of such modules.

    Raises:
        ActLoadError: weights lie elsewhere because of a `device_map`. No file has been written.
    """
    places = {"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if places and away:
        raise ActLoadError(
            f"adapter {adapter_name!r}: {away[0]} of the base is offloaded by device_map, expected a base in memory "
            "before an adapter is loaded (PEFT would write the base's own files anew; load the base again without "
            "offloading, or merge on disk with merge_checkpoint and load the merged folder with this device_map)"
        )


def check_base(
    config: ActConfig,
    adapter_name: str,
    layers: Mapping[str, ActLayer],
    indices: Mapping[str, torch.Tensor],
) -> None:
    """Compare the base rows with the fingerprints that the adapter has recorded.

    Args:
        config: the adapter's configuration.
        adapter_name: name of the adapter.
        layers: module name -> layer.
        indices: module name -> channels that are loaded, int64 `[K]`.

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
