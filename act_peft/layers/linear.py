"""ACT on `torch.nn.Linear`: a channel is a row of the weight and an element of the bias."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from act_peft.channels.kinds import ChannelKind
from act_peft.layers.base import ActLayer
from act_peft.layers.streaming import streamed_linear


class Linear(ActLayer):
    """A linear layer with deltas on some of its outputs.

        y[..., index] += x @ delta_weight.T + delta_bias

    Shapes: x `[..., I]`, delta_weight `[K, I]`, delta_bias `[K]`, y `[..., O]`. 2·K·I operations a token; no weight of
    shape `[O, I]` is built.

    Attributes:
        is_output_head: whether this is the model's output embedding. Some trainers (TRL's fused head) compute the loss
            from `lm_head.weight` and do not call the module. They find the adapted weight there.
    """

    kind = ChannelKind.LINEAR
    is_output_head = False

    def change(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """See `ActLayer.change`."""
        weight = self.act_delta_weight[adapter_name]  # [K, I]
        bias = self.act_delta_bias.get(adapter_name)  # [K] or None
        linear = streamed_linear if adapter_name in self._offloaded else F.linear
        return linear(self._cast_input_dtype(x, weight.dtype), weight, bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """See `changes_weight_only`."""
        return changes_weight_only(self, adapter_name)

    @property
    def weight(self) -> torch.Tensor:
        """The base weight; for the output head the weight with the active deltas, differentiable in them."""
        return self._adapted(super().weight, "weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """The base bias; for the output head the bias with the active deltas, differentiable in them."""
        bias = super().bias
        return None if bias is None else self._adapted(bias, "bias")

    def _adapted(self, tensor: torch.Tensor, part: str) -> torch.Tensor:
        if not self.is_output_head or self.is_quantized or self.disable_adapters or self.merged:
            return tensor
        if tensor.device.type == "meta":  # as the plain layer, which has its weight only while it runs
            return tensor
        for name in sorted(self.active_adapters):
            if name in getattr(self, f"act_delta_{part}"):
                change = (self.delta(name, part) * self.act_delta_scale[name]).to(tensor.dtype)
                tensor = tensor.index_add(0, self.act_delta_index[name], change)
        return tensor


def changes_weight_only(layer: ActLayer, adapter_name: str) -> bool:
    """Whether an adapter of a linear layer changes only its weight.

    PEFT's `convert_to_lora` asks this. It would lose the deltas of a bias. `export_lora` can keep them.
    """
    if adapter_name not in layer.act_delta_weight or not layer.knows_channels(adapter_name):
        return False
    return adapter_name not in layer.act_delta_bias or not bool(layer.act_delta_bias[adapter_name].any())
