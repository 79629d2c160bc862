"""Rows of linear layers with a quantized weight: dequantized for reading, quantized again for writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import ChannelRows
from act_peft.doors import dequantize_bnb_weight
from act_peft.errors import ActTypeError
from act_peft.layers.rows import BaseRows


class QuantizedRows(BaseRows):
    """Rows of a linear layer with a quantized weight.

    Written rows are rounded to values that the quantization can store. The original quantized tensor is kept, so
    restoring is exact.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        super().__init__(ChannelKind.LINEAR, shares_weight=False)
        self._kept_weight: nn.Parameter | None = None
        self._kept_bias: torch.Tensor | None = None

    def original(self, base: Any, index: torch.Tensor) -> ChannelRows:
        """See `BaseRows.original`; the rows are dequantized.

        Raises:
            ActTypeError: a weight of unknown form.
        """
        index = index.to(base.weight.device)
        bias = base.bias if self._kept_bias is None else self._kept_bias
        return ChannelRows(
            index,
            self._dense(base).index_select(0, index),
            None if bias is None else bias.detach().to(index.device).index_select(0, index),
        )

    def write(self, base: Any, rows: ChannelRows) -> None:
        """See `BaseRows.write`.

        Raises:
            ActTypeError: a weight of unknown form.
        """
        dense = self._dense(base)
        dense.index_copy_(0, rows.index.to(dense.device), rows.weight.to(dense))
        quantized = _form_of(base).quantize(base.weight, dense)
        if self._kept_weight is None:
            self._kept_weight = _complete(base)
            self._kept_bias = None if base.bias is None else base.bias.detach().clone()
        _replace(base, quantized)
        if rows.bias is not None:
            base.bias.data.index_copy_(0, rows.index, rows.bias)

    def restore(self, base: Any) -> None:
        """See `BaseRows.restore`."""
        if self._kept_weight is not None:
            device = base.weight.device
            kept = self._kept_weight
            _replace(base, kept if kept.device == device else kept.to(device))
            if self._kept_bias is not None:
                base.bias.data.copy_(self._kept_bias)
        self._kept_weight = self._kept_bias = None

    def _dense(self, base: Any) -> torch.Tensor:
        """A dequantized copy of the original weight, `[O, I]`."""
        weight = _complete(base) if self._kept_weight is None else self._kept_weight
        return _form_of(base).dequantize(weight).detach().clone()


@dataclass(frozen=True)
class _Form:
    """One way to store a weight: stored tensor -> values `[O, I]`, and values -> tensor stored like a given one."""

    dequantize: Callable[[Any], torch.Tensor]
    quantize: Callable[[Any, torch.Tensor], nn.Parameter]


def _form_of(base: Any) -> _Form:
    weight = base.weight
    form = _FORMS.get(type(weight).__name__)
    whole_rows = form is not _TORCHAO or (
        list(weight.block_size) == [1, weight.shape[1]] and not weight.act_quant_kwargs
    )
    if form is None or not whole_rows:
        raise ActTypeError(
            f"{type(base).__name__}: its weight is a {type(weight).__name__} ({weight.dtype}), which is neither read "
            "nor written here, expected bitsandbytes' 4 or 8 bit or torchao's int8 with a scale per row (keep the "
            "adapter unmerged, or merge it into the base in full precision with merge_checkpoint)"
        )
    return form


def _complete(base: Any) -> nn.Parameter:
    """The weight in bitsandbytes' first layout. Its layers rearrange the weight when they run for the first time."""
    weight = base.weight
    if type(weight).__name__ == "Int8Params" and weight.SCB is None:  # moved to the layer
        weight.CB, weight.SCB = weight.data, base.state.SCB
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        block_scales = weight.quant_state.absmax.T.reshape(-1).float()  # as the packed kernel uses them
        base.state_dict()  # unpacks the codes of a Linear4bit, but keeps or rounds the scales of its blocks
        state = base.weight.quant_state
        state.absmax, state.nested, state.offset, state.state2 = block_scales, False, None, None
    return base.weight


def _replace(base: Any, weight: Any) -> None:
    base.weight = weight
    if hasattr(base, "state"):  # where 8 bit layers of bitsandbytes keep codes and scales
        base.state.reset_grads()
    if hasattr(base, "quant_state"):  # where its 4 bit layers keep scales
        base.quant_state = weight.quant_state


def _dequantized_rows(weight: Any) -> torch.Tensor:
    return weight.data * (weight.SCB.to(weight.device)[:, None] / 127)


def _quantized_rows(like: Any, dense: torch.Tensor) -> nn.Parameter:
    stored = type(like)(dense.to("cpu"), requires_grad=False, has_fp16_weights=like.has_fp16_weights)
    return stored.to(like.device)


def _quantized_blocks(like: Any, dense: torch.Tensor) -> nn.Parameter:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    stored = type(like)(dense.to("cpu"), requires_grad=False, **{name: getattr(like, name) for name in names})
    return stored.to(like.device)


def _quantized_by_torchao(like: Any, dense: torch.Tensor) -> nn.Parameter:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(dense.to(like.dtype), requires_grad=False)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder.weight


_TORCHAO = _Form(lambda weight: weight.dequantize(), _quantized_by_torchao)
_FORMS = {
    "Int8Params": _Form(_dequantized_rows, _quantized_rows),
    "Params4bit": _Form(dequantize_bnb_weight, _quantized_blocks),
    "Int8Tensor": _TORCHAO,
}
