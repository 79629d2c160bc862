"""ACT on `torch.nn.Embedding`: a channel is a column of the embedding matrix."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from act_peft.channels.kinds import ChannelKind
from act_peft.layers.base import ActLayer


class Embedding(ActLayer):
    """An embedding with deltas on some of its columns.

        y[..., index] += delta_weight[ids]

    Shapes: ids `[...]` int64, delta_weight `[V, K]`, y `[..., C]`. If an embedding multiplies its
    output (`embed_scale`, as in Gemma 3), the change is multiplied too.
    """

    kind = ChannelKind.EMBEDDING

    def change(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """See `ActLayer.change`."""
        base, weight = self.get_base_layer(), self.act_delta_weight[adapter_name]
        change = F.embedding(
            x.to(weight.device),  # an offloaded delta is read in CPU memory
            weight,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        ).to(x.device)  # [..., K]
        embed_scale = self._get_embed_scale()
        return change if embed_scale is None else change * embed_scale.to(change.dtype)
