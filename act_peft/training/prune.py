"""Pruning: learned scales are multiplied into the rows, and channels without effect are removed."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from act_peft.adapter.config import record_adapter
from act_peft.checks import finite_number
from act_peft.errors import ActValueError
from act_peft.layers import remove_adapter
from act_peft.layers.lookup import adapter_layers, base_model, check_unmerged, record
from act_peft.shards import is_shared_out
from act_peft.training.scales import _scales_of


def prune_channels(model: nn.Module, *, threshold: float = 0.0, adapter_name: str = "default") -> None:
    """Turn an adapter with learned scales into an ordinary ACT adapter, without the channels that have no effect.

        delta[i, :] <- s_i * delta[i, :]      for every channel with |s_i| > threshold; all other channels are removed

    With `threshold` 0 only channels with a learned scale of exactly zero are removed, so outputs change only by the
    rounding of the product. Afterwards the rows are trained (`trainable="deltas"`), unless the adapter is frozen, and
    files hold only the channels that are left. An older optimizer has to be made again.

    Args:
        model: a `PeftModel` with an ACT adapter, or a model that an ACT adapter was injected into.
        threshold: channels with a learned scale of at most this size are removed; at least 0.
        adapter_name: name of the adapter.

    Raises:
        ActValueError: no such adapter, an adapter without learned scales, a merged one, scales that are not finite, a
            threshold that is negative or above every scale. Then nothing is changed.
        ActTypeError: a threshold that is no number.

    Example:
        >>> config = ActConfig(channels=mask, donor=DONOR, trainable="scales", task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)  # and train it with ScaleSparsityCallback
        >>> prune_channels(model, threshold=0.1)
        >>> model.peft_config["default"].trainable
        'deltas'
    """
    threshold = finite_number(threshold, "threshold", least=0)
    layers = adapter_layers(model, adapter_name)
    without = [name for name, layer in layers.items() if adapter_name not in layer.act_delta_channel_scale]
    if without:
        raise ActValueError(
            f"{without[0]}: adapter {adapter_name!r} has no learned scales, expected trainable='scales' or 'both' "
            f"({len(without)} of {len(layers)} modules have none; was it pruned already, or made for rows?)"
        )
    check_unmerged(layers, adapter_name)
    spread = [name for name, layer in layers.items() if is_shared_out(_scales_of(layer, adapter_name))]
    if spread:
        raise ActValueError(
            f"{spread[0]}: the learned scales of adapter {adapter_name!r} are spread over processes, expected them in "
            "one piece (save the adapter, load it on the base with is_trainable=True, then prune it)"
        )
    broken = [n for n, layer in layers.items() if not torch.isfinite(_scales_of(layer, adapter_name)).all()]
    if broken:
        raise ActValueError(
            f"{broken[0]}: got learned scales that are not finite, expected finite numbers ({len(broken)} of "
            f"{len(layers)} modules; did the training diverge? try a lower learning rate)"
        )
    kept = {
        name: (layer.act_delta_channel_scale[adapter_name].detach().abs() > threshold).nonzero().squeeze(1)
        for name, layer in layers.items()
    }
    if not any(channels.numel() for channels in kept.values()):
        raise ActValueError(
            f"threshold: got {threshold:g}, which no learned scale exceeds, expected at least one channel "
            f"above it ({'take a lower threshold, or ' if threshold else ''}train with a weaker penalty)"
        )
    configs, base = cast(Any, model).peft_config, base_model(model)
    config = configs[adapter_name] = copy.copy(configs[adapter_name])  # TRL's reference adapter uses the same object
    share = sum(channels.numel() for channels in kept.values()) / sum(
        layer.act_delta_channel_scale[adapter_name].numel() for layer in layers.values()
    )
    for name, layer in layers.items():
        if kept[name].numel():
            layer.fold_scales(adapter_name, kept[name])
            continue
        remove_adapter(base, name, adapter_name)
    left = {name: layer for name, layer in layers.items() if kept[name].numel()}
    config.trainable, config.offload_deltas = "deltas", False
    modules = {
        name: record(layer, layer.act_delta_index[adapter_name], include_bias=layer.changes_bias(adapter_name))
        for name, layer in left.items()
    }
    record_adapter(config, modules, kept=share)
