"""ACT on norm modules: a channel is one element of the weight and of the bias."""

from __future__ import annotations

import torch

from act_peft.channels.kinds import ChannelKind, norm_epsilon, normalize
from act_peft.layers.base import ActLayer


class _Norm(ActLayer):
    """A norm module with deltas on some of its elements.

        y[..., index] += normalized(x)[..., index] * delta_weight + delta_bias

    Shapes: x and y `[..., C]`, delta_weight and delta_bias `[K]`. The formula holds for every norm whose output is
    affine in its weight, `weight * normalized(x)` as well as `(1 + weight) * normalized(x)`.
    """

    def change(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """See `ActLayer.change`."""
        index = self.act_delta_index[adapter_name]
        selected = normalize(x, self.kind, norm_epsilon(self.get_base_layer()), index=index)  # [..., K]
        change = selected * self.act_delta_weight[adapter_name]
        if adapter_name in self.act_delta_bias:
            change = change + self.act_delta_bias[adapter_name]
        return change


class LayerNorm(_Norm):
    """ACT on a layer norm (the input is centred and scaled)."""

    kind = ChannelKind.LAYER_NORM


class RMSNorm(_Norm):
    """ACT on an RMS norm of any model (the input is scaled)."""

    kind = ChannelKind.RMS_NORM
