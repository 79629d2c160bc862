"""Rows of a base module: reading them, writing merged ones, restoring the originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import ChannelRows
from act_peft.offloading import keeps_elsewhere, values_of
from act_peft.shards import write_rows_


class BaseRows:
    """Rows of a module with a plain weight. Overwritten rows are kept, so restoring is exact."""

    def __init__(self, kind: ChannelKind, *, shares_weight: bool) -> None:
        """Keep nothing yet.

        Args:
            kind: kind of the module that every method gets.
            shares_weight: whether another module uses the same weight or bias (tied embeddings). Writing then gives
                this module copies until the originals are restored.
        """
        self._dim = kind.channel_dim
        self._shares_weight = shares_weight
        self._kept: ChannelRows | None = None
        self._tied: dict[str, nn.Parameter] = {}

    def original(self, base: Any, index: torch.Tensor) -> ChannelRows:
        """Copies of the parameters of channels `index` (int64 `[K]`, ascending) as they were before any `write`."""
        values = values_of(base, "weight")
        index = index.to(values.device)
        weight = values.index_select(self._dim, index)
        has_bias = getattr(base, "bias", None) is not None
        bias = values_of(base, "bias").index_select(0, index) if has_bias else None
        if self._kept is not None and index.numel():
            kept = self._kept
            where = torch.searchsorted(index, kept.index.to(index.device)).clamp(max=index.numel() - 1)
            hit = index[where] == kept.index.to(index.device)
            source = hit.nonzero().squeeze(1)
            weight.index_copy_(self._dim, where[hit], kept.weight.to(weight).index_select(self._dim, source))
            if bias is not None and kept.bias is not None:
                bias.index_copy_(0, where[hit], kept.bias.to(bias).index_select(0, source))
        return ChannelRows(index, weight, bias)

    def write(self, base: Any, rows: ChannelRows) -> None:
        """Overwrite the parameters of `rows.index`. It must include all channels that were written before."""
        self._kept = self.original(base, rows.index)
        if self._shares_weight and not self._tied:
            self._tied = {part: p for part in ("weight", "bias") if (p := getattr(base, part, None)) is not None}
            for part, parameter in self._tied.items():
                setattr(base, part, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        elif keeps_elsewhere(base):  # in CPU memory tied weights are one tensor, although their parameters are not
            for part in ("weight", "bias"):
                if getattr(base, part, None) is not None:
                    setattr(base, part, nn.Parameter(getattr(base, part).detach().clone(), requires_grad=False))
        self._overwrite(base, rows)

    def restore(self, base: Any) -> None:
        """Restore the bytes from before any `write`, and the ties of tied parameters."""
        if self._kept is not None:
            kept, bias = self._kept, self._kept.bias
            self._overwrite(
                base,
                ChannelRows(
                    kept.index.to(base.weight.device),
                    kept.weight.to(base.weight.device, base.weight.dtype),
                    None if bias is None else bias.to(base.bias.device, base.bias.dtype),
                ),
            )
            for part, parameter in self._tied.items():
                setattr(base, part, parameter)
        self._kept, self._tied = None, {}

    def _overwrite(self, base: Any, rows: ChannelRows) -> None:
        write_rows_(base.weight, rows.index, rows.weight, self._dim)
        if rows.bias is not None:
            write_rows_(base.bias, rows.index, rows.bias, 0)
