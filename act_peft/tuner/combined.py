"""One adapter of several, in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from act_peft.channels.names import matching_key
from act_peft.combination.combine import _settings, _sources_in
from act_peft.combination.rules import Rule
from act_peft.combination.union import UnionModule, union_modules
from act_peft.errors import ActValueError
from act_peft.layers.deltas import PREFIX


def add_combined(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    rule: Rule,
) -> None:
    """Give a model an adapter that combines some of its adapters; `ActModel.add_weighted_adapter` says how.

    Args:
        tuner: the `ActModel`.
        adapters: names of its adapters.
        weights: a factor for each.
        adapter_name: name of the new one.
        rule: from `make_rule`.

    Raises:
        ActValueError, ActTypeError: as `ActModel.add_weighted_adapter`; the model is as it was then.
    """
    sources = _sources_in(tuner, adapters, weights)
    _check_name(tuner, adapter_name)
    modules = union_modules(sources)
    made = {module.name: module.combine(sources, rule, None) for module in modules}
    config = _settings(sources)
    origin = config.donor, config.donor_revision
    config.donor = config.donor_revision = None  # a record of what was; nothing is transferred now
    config.channels = _channels_of(tuner.model, modules)
    trains = {parameter: parameter.requires_grad for parameter in tuner.parameters()}
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise
    finally:
        for parameter, train in trains.items():
            parameter.requires_grad_(train)
    config.donor, config.donor_revision = origin
    for name, deltas in made.items():
        layer = tuner.model.get_submodule(name)
        for part, delta in deltas.items():
            parameter = getattr(layer, f"{PREFIX}{part}")[adapter_name]
            parameter.data = delta.to(parameter.device)


def _check_name(tuner: Any, adapter_name: Any) -> None:
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ActValueError(f"adapter_name: got {adapter_name!r:.80}, expected a name without dots")
    if adapter_name in tuner.peft_config:
        raise ActValueError(
            f"adapter_name: got {adapter_name!r}, which the model has, expected a new name (delete_adapter removes "
            "the old one)"
        )


def _channels_of(model: nn.Module, modules: Sequence[UnionModule]) -> dict[str, torch.Tensor]:
    """The channels for `ActConfig`, in which a name also means the modules whose names end with it."""
    channels = {module.name: module.index for module in modules}
    others = {n for n, _ in model.named_modules() if n and n not in channels and matching_key(n, channels)}
    return {**channels, **dict.fromkeys(others, torch.empty(0, dtype=torch.int64))}
