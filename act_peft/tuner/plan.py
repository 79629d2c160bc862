"""What is decided about an adapter before PEFT injects it into a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from act_peft.channels.kinds import kind_of, weight_of
from act_peft.layers import LAYER_CLASSES, ActLayer, Linear, remove_adapter
from act_peft.layers.lookup import act_layers
from act_peft.peft_modules import inner_layer


@dataclass(frozen=True)
class InjectionPlan:
    """The targets of an adapter, and facts about the model. PEFT walks through the modules and asks here.

    Attributes:
        indices, answers: as in `Targets`.
        device: device of the new layers' indices.
        shared_parameters: ids of the parameters that several modules use.
        output_head: the model's output embedding, if there is one.
    """

    indices: dict[str, torch.Tensor]
    answers: dict[str, Any]
    device: torch.device
    shared_parameters: set[int]
    output_head: nn.Module | None

    def layer_for(self, target: nn.Module) -> ActLayer:
        """The target itself if it is an ACT layer already, otherwise a new layer around it."""
        if isinstance(target, ActLayer):
            return target
        plain = inner_layer(target)
        parts = (weight_of(plain), plain._parameters.get("bias"))
        shares_weight = any(id(parameter) in self.shared_parameters for parameter in parts)
        layer = LAYER_CLASSES[kind_of(plain)](target, shares_weight=shares_weight)
        if isinstance(layer, Linear):
            layer.is_output_head = target is self.output_head
        layer.train(target.training)
        return layer


def withdraw(model: nn.Module, adapter_name: str, trainable: list[nn.Parameter]) -> None:
    """Take an unfinished adapter out of a model again.

    Args:
        model: the base model.
        adapter_name: name of the adapter.
        trainable: parameters that train again if the model has no ACT adapter left.
    """
    for name in act_layers(model):
        remove_adapter(model, name, adapter_name)
    if not act_layers(model):
        for parameter in trainable:
            parameter.requires_grad_(True)
