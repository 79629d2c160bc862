"""Checks of a whole adapter that is being loaded.

| hook | called | checks |
|---|---|---|
| `ActModel._remap_adapter_state_dict_for_load` | by PEFT, for a whole adapter | names, missing ones, dtypes, indices |
| `ActModel._load_from_state_dict` | by torch, before any copy | dtypes, indices, shapes, the base's weights |
| `DeltaLayer._load_from_state_dict` | by torch, for each layer | dtypes, indices, shapes |

A plain `load_state_dict` does not call the first hook. Loading a single layer calls only the last one. The first
hook leaves shapes to the later ones, because PEFT's `ignore_mismatched_sizes` drops tensors in between.
"""

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
        comparison.add_(name, recorded_base(config.adapted_modules, name), partial(_base_of, layers[name], index))
    note = comparison.note()
    if note is not None:
        warnings.warn(
            f"{note} (load it on {config.base_model_name_or_path or 'the base that it was trained on'}; on another "
            "model its channels may do nothing or harm)",
            ActWarning,
            stacklevel=3,
        )


def _base_of(layer: ActLayer, index: torch.Tensor) -> str | None:
    """Fingerprint of the layer's own base rows."""
    return cast("str | None", record(layer, index)["base"])
