"""Loading of a layer's tensors: what is expected, what has arrived, and whether it was checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from act_peft.adapter.state import INDEX, SELECTED, ExpectedState, check_state
from act_peft.layers.deltas import UNKNOWN, DeltaLayer, unknown_index
from act_peft.shards import is_partitioned

_PLACEHOLDER = "_act_placeholder"  # attribute of a parameter that waits for its values


class Awaited(Protocol):
    """An adapter whose tensors are being loaded (`tuner.awaited.Awaited`)."""

    def settle(self) -> None:
        """Check what has arrived."""


class LoadableLayer(DeltaLayer):
    """A layer that takes the tensors of an adapter from a file, and checks them before it uses them."""

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`, which is not changed."""
        super().__init__(base_layer)
        self._awaited: dict[str, Awaited] = {}  # adapters whose tensors are not checked yet

    def remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, if the layer has it. The list of active adapters does not change."""
        super().remove_adapter(adapter_name)
        self.stop_waiting(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT: remove an adapter. If it was active, a different one becomes active."""
        super().delete_adapter(adapter_name)
        self.stop_waiting(adapter_name)

    def expected_state(self, adapter_name: str) -> ExpectedState:
        """The tensors that the layer expects of an adapter that is being loaded."""
        shapes = {"act_delta_weight": [self.delta_shape(SELECTED)]}
        if self.changes_bias(adapter_name):
            shapes["act_delta_bias"] = [(SELECTED,)]
        if adapter_name in self.act_delta_channel_scale:
            shapes["act_delta_channel_scale"] = [(SELECTED,)]
        # A training with ZeRO 3 loads parts, whose shapes say nothing.
        shapes = {name: s for name, s in shapes.items() if not is_partitioned(getattr(self, name)[adapter_name])}
        index = self.act_delta_index[adapter_name]
        known = index if self.knows_channels(adapter_name) else None
        return ExpectedState(self.num_channels, index.numel() or None, shapes, index=known)

    def knows_channels(self, adapter_name: str) -> bool:
        """Whether the adapter's channels are known already, before its tensors are loaded."""
        index = self.act_delta_index[adapter_name]
        return index.device.type != "meta" and index.numel() > 0 and not bool((index == UNKNOWN).all())

    def await_tensors(self, adapter_name: str, awaited: Awaited) -> None:
        """Remember that the tensors of an adapter are placeholders, which `awaited` checks when others are there."""
        self._awaited[adapter_name] = awaited
        for parameter in self._parameters_of(adapter_name).values():
            setattr(parameter, _PLACEHOLDER, True)

    def awaits(self, adapter_name: str) -> bool:
        """Whether the tensors of an adapter have not been checked since it was created."""
        return adapter_name in self._awaited

    def stop_waiting(self, adapter_name: str) -> None:
        """The tensors of an adapter have been checked."""
        self._awaited.pop(adapter_name, None)

    def settle(self, adapter_names: Iterable[str]) -> None:
        """Check awaited adapters that are about to be used.

        Raises:
            ActLoadError: their tensors are not loaded, or do not fit.
        """
        for name in adapter_names:
            if name in self._awaited:
                self._awaited[name].settle()

    def arrived(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The tensors of an awaited adapter that are no placeholders any more, without the adapter's name."""
        found = {
            name: parameter
            for name, parameter in self._parameters_of(adapter_name).items()
            if not hasattr(parameter, _PLACEHOLDER)
        }
        index = self.act_delta_index[adapter_name]
        if self.knows_channels(adapter_name) or (found and not index.numel()):
            found[INDEX] = index
        return found

    def _parameters_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        containers = ((name, getattr(self, name)) for name in self.adapter_layer_names)
        return {name: container[adapter_name] for name, container in containers if adapter_name in container}

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch calls this before it loads the parameters inside, so they are checked and resized in time.
        for adapter_name in list(self.act_delta_index.keys()):
            state = self.adapter_state(state_dict, prefix, adapter_name)
            check_state(self.expected_state(adapter_name), state, prefix.rstrip("."), complete=False)
            index = state.get(INDEX)
            if index is not None and self.act_delta_index[adapter_name].numel() != index.numel():
                self._resize(adapter_name, index.numel())
            for name in state:
                if name != INDEX:  # torch copies into these
                    vars(getattr(self, name)[adapter_name]).pop(_PLACEHOLDER, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def adapter_state(
        self, state_dict: dict[str, torch.Tensor], prefix: str, adapter_name: str
    ) -> dict[str, torch.Tensor]:
        """The tensors of one adapter of this layer in a state dict, without prefix and adapter name."""
        names = (*self.adapter_layer_names, INDEX)
        keys = {name: f"{prefix}{name}.{adapter_name}" for name in names}
        return {name: state_dict[key] for name, key in keys.items() if key in state_dict}

    def _resize(self, adapter_name: str, num_selected: int) -> None:
        old = self.act_delta_index[adapter_name]
        self.act_delta_index[adapter_name] = unknown_index(num_selected).to(old.device)
        for container, shape in (
            (self.act_delta_weight, self.delta_shape(num_selected)),
            (self.act_delta_bias, (num_selected,)),
            (self.act_delta_channel_scale, (num_selected,)),
        ):
            if adapter_name in container:
                parameter = container[adapter_name]
                container[adapter_name] = nn.Parameter(
                    torch.zeros(shape, dtype=parameter.dtype, device=parameter.device), parameter.requires_grad
                )
                vars(container[adapter_name]).update(vars(parameter))
