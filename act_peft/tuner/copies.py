"""An adapter that starts as a copy of another one, such as the frozen reference of a trainer."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch

from act_peft.doors import POLICY, REFERENCE
from act_peft.layers import ActLayer


def find_twin(adapter_name: str, *, configs: Mapping[str, Any], awaiting: Container[str]) -> str | None:
    """The adapter that a new adapter copies; None if it copies none.

    Both have the same configuration object. Either it was read from a file, which does not hold the channels, or the
    new adapter is the reference of a TRL trainer.

    Args:
        adapter_name: name of the new adapter.
        configs: adapter name -> configuration, of all adapters including the new one.
        awaiting: adapters whose tensors are not loaded yet; they cannot be copied.
    """
    config = configs[adapter_name]
    for name, other in configs.items():
        copied = config.channels is None or (adapter_name, name) == (REFERENCE, POLICY)
        if copied and other is config and name != adapter_name and name not in awaiting:
            return name
    return None


def copy_adapter_(layers: Mapping[str, ActLayer], source: str, target: str) -> None:
    """Copy channels, deltas and scales of one adapter into another one with the same layers and shapes."""
    with torch.no_grad():
        for layer in layers.values():
            for container in (getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)):
                if source not in container:
                    continue
                if isinstance(container[source], torch.Tensor):
                    container[target].copy_(container[source])
                else:
                    container[target] = container[source]
