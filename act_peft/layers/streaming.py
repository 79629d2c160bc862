"""Frozen deltas that stay in CPU memory. They are copied to the device each time a layer needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class _StreamedLinear(torch.autograd.Function):
    """`F.linear` with a frozen weight that may be on a different device than its input.

    For the backward pass autograd keeps the weight on its own device. It keeps neither the copy nor the input.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.device), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients  # [..., K], in the dtype that autocast gave the output
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.device).to(gradient.dtype), None, None


def streamed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`; the weight is copied to the device of `x` in the forward and in the backward pass.

    Args:
        x: `[..., I]`; the only input that gets a gradient.
        weight: `[K, I]`, frozen, on any device.
        bias: `[K]`, frozen, on the device of `x`; or None.

    Returns:
        `[..., K]` on the device of `x`.
    """
    return _StreamedLinear.apply(x, weight, bias)
