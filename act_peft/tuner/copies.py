"""An adapter that starts as a copy of another one, as trainers make their frozen reference."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch

from act_peft.doors import POLICY, REFERENCE
from act_peft.layers import ActLayer


def find_twin(adapter_name: str, *, configs: Mapping[str, Any], awaiting: Container[str]) -> str | None:
    """The adapter that a new one starts as a copy of; None for a fresh one.

    It is one with the very same configuration object, if that was read from a file, which says nothing of the channels
    (they are in the adapter), or if the new adapter is the reference of a TRL trainer.

    Args:
        adapter_name: name of the new adapter.
        configs: adapter name -> configuration, of all adapters including the new one.
        awaiting: adapters whose tensors are still to be loaded, which cannot be copied.
    """
    config = configs[adapter_name]
    for name, other in configs.items():
        copied = config.channels is None or (adapter_name, name) == (REFERENCE, POLICY)
        if copied and other is config and name != adapter_name and name not in awaiting:
            return name
    return None


def copy_adapter_(layers: Mapping[str, ActLayer], source: str, target: str) -> None:
    """Write what one adapter holds (channels, deltas, scale) into another one of the same layers and shapes."""
    with torch.no_grad():
        for layer in layers.values():
            for container in (getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)):
                if source not in container:
                    continue
                if isinstance(container[source], torch.Tensor):
                    container[target].copy_(container[source])
                else:
                    container[target] = container[source]
