"""What a new adapter starts with: deltas, and what its configuration says about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from act_peft.adapter.config import ActConfig, record_adapter
from act_peft.adapter.models import name_of
from act_peft.disk.locations import lasting_name
from act_peft.layers.lookup import record
from act_peft.transfer.difference import Transfer
from act_peft.transfer.in_model import fill_deltas


def fill_new_adapter(
    config: ActConfig,
    model: nn.Module,
    indices: Mapping[str, torch.Tensor],
    transfer: Transfer | None,
    *,
    adapter_name: str,
) -> None:
    """Write the deltas of a new adapter, and its record in the configuration.

    Args:
        config: the adapter's configuration.
        model: the base model with the new layers in it.
        indices: module name -> selected channels, int64 `[K]`.
        transfer: from the donor; None without one.
        adapter_name: name of the adapter.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in indices}
    if transfer is not None:
        scale = 1.0 if config.trains.has_scales else config.transfer_scale
        deltas = ((name, rows) for name, _, rows in transfer.deltas(indices, transfer_scale=scale))
        fill_deltas(layers, deltas, adapter_name=adapter_name, transfer_scale=config.transfer_scale)
        transfer.warn(stacklevel=5)
    record_adapter(
        config,
        {name: record(layer, indices[name], include_bias=config.include_bias) for name, layer in layers.items()},
    )
    if not config.from_file:
        config.base_model_name_or_path = name_of(model) or config.base_model_name_or_path
        config.donor = None if config.donor is None else lasting_name(config.donor)
