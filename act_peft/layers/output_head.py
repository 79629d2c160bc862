"""The output layer as other libraries see it: with the weight that its adapters give it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from act_peft.layers.linear import Linear


class AdaptedHead(nn.Module):
    """An adapted output layer that looks like a plain one.

    Trainers read `weight` and `bias` of the output layer and compute the loss from them, without calling the layer.
    Here they find the adapted ones, differentiable in the deltas. It is no layer of PEFT, so that trainers that refuse
    those (their weight would be the plain one) accept it.

    Args:
        layer: the adapted output layer.

    Attributes:
        base_layer: the plain layer inside.
    """

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # no child: parameters have one owner

    @property
    def base_layer(self) -> nn.Module:
        """The plain layer."""
        return self._layer.get_base_layer()

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the active deltas."""
        return self._layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias with the active deltas."""
        return self._layer.bias

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the adapted layer."""
        return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Sizes and the like.
        return getattr(object.__getattribute__(self, "_layer").get_base_layer(), name)


def seen_from_outside(head: nn.Module | None) -> nn.Module | None:
    """What other libraries get when they ask a PEFT model for its output layer.

    A quantized weight cannot be read with its deltas. The adapted layer itself is returned then: trainers that read
    the weight refuse it.
    """
    if isinstance(head, Linear) and head.is_output_head and not head.is_quantized:
        return AdaptedHead(head)
    return head
