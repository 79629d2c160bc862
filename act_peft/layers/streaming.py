"""Frozen deltas that stay in CPU memory and are copied to the device whenever a layer needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class _StreamedLinear(torch.autograd.Function):
    """`F.linear` with a frozen weight that may lie on another device than its input.

    What autograd keeps for the backward pass is the weight where it lies, not its copy, and not the input.
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
