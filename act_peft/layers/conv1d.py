"""ACT on transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored transposed."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from act_peft.channels.kinds import ChannelKind
from act_peft.layers.base import ActLayer
from act_peft.layers.linear import changes_weight_only
from act_peft.layers.streaming import streamed_linear


class Conv1D(ActLayer):
    """A transposed linear layer with deltas on some of its outputs.

        y[..., index] += x @ delta_weight + delta_bias

    Shapes: x `[..., I]`, delta_weight `[I, K]`, delta_bias `[K]`, y `[..., O]`.
    """

    kind = ChannelKind.CONV1D

    def change(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """See `ActLayer.change`."""
        weight = self.act_delta_weight[adapter_name]  # [I, K]
        linear = streamed_linear if adapter_name in self._offloaded else F.linear
        return linear(self._cast_input_dtype(x, weight.dtype), weight.T, self.act_delta_bias.get(adapter_name))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """See `changes_weight_only`."""
        return changes_weight_only(self, adapter_name)
