"""Channels: which modules have them, along which axis of the weight, and how many.

A channel is one output coordinate of a module. This file is the only place that knows which axis of `weight` the
channels lie on. Localization, the tuner layers and the readers of checkpoints ask here.

| kind | module | weight | channel i is |
|---|---|---|---|
| linear | `torch.nn.Linear` | `[O, I]` | row i, and `bias[i]` |
| conv1d | `transformers.pytorch_utils.Conv1D` | `[I, O]` | column i, and `bias[i]` |
| embedding | `torch.nn.Embedding` | `[V, C]` | column i |
| layer norm, RMS norm | `torch.nn.LayerNorm`, `torch.nn.RMSNorm`, similar | `[C]` | element i, and `bias[i]` |
"""

from __future__ import annotations

import copy
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Conv1D

from act_peft.errors import ActTypeError
from act_peft.shards import full_shape


class ChannelKind(Enum):
    """The kinds of modules that have channels."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    LAYER_NORM = "layer norm"
    RMS_NORM = "RMS norm"

    @property
    def channel_dim(self) -> int:
        """Axis of the module's `weight` along which the channels lie."""
        return 1 if self in (ChannelKind.CONV1D, ChannelKind.EMBEDDING) else 0

    def axis_of(self, part: str) -> int:
        """Axis of the channels in the module's `"weight"` or `"bias"`."""
        return self.channel_dim if part == "weight" else 0

    @property
    def is_norm(self) -> bool:
        """Whether a channel is a single element of a 1-D weight."""
        return self in (ChannelKind.LAYER_NORM, ChannelKind.RMS_NORM)


def normalize(x: torch.Tensor, kind: ChannelKind, eps: float, *, index: torch.Tensor | None = None) -> torch.Tensor:
    """The normalized input of a norm module, before its weight and bias are applied.

    Args:
        x: `[..., C]`, any floating dtype; the computation is in float32 or wider.
        kind: `ChannelKind.LAYER_NORM` or `ChannelKind.RMS_NORM`.
        eps: the module's epsilon.
        index: int64 `[K]`, the channels to return; all of them by default.

    Returns:
        `[..., C]`, or `[..., K]` with `index`, in float32 (float64 for a float64 input).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    selected = x if index is None else x.index_select(-1, index)  # [..., K]
    if kind is ChannelKind.LAYER_NORM:
        mean = x.mean(-1, keepdim=True)  # [..., 1]
        return (selected - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    return selected * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def norm_epsilon(module: nn.Module) -> float:
    """The epsilon of a norm module; modules store it under different names.

    `torch.nn.RMSNorm(eps=None)` means the machine epsilon of the input's dtype. Here it is that of the weight's dtype.
    """
    for name in ("eps", "variance_epsilon", "epsilon"):
        if name in vars(module):
            value = vars(module)[name]
            return torch.finfo(weight_of(module).dtype).eps if value is None else float(value)
    return 0.0


def channel_kind(module: nn.Module) -> ChannelKind | None:
    """The kind of `module`, or None if its outputs are not channels of a plain weight.

    A linear layer may have a quantized weight (`is_quantized`): its outputs are channels too.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    if isinstance(module, nn.Linear):
        return ChannelKind.LINEAR
    if not weight.is_floating_point():
        return None
    if isinstance(module, Conv1D):
        return ChannelKind.CONV1D
    if isinstance(module, nn.Embedding):
        return ChannelKind.EMBEDDING if module.max_norm is None else None
    if isinstance(module, nn.LayerNorm):
        return ChannelKind.LAYER_NORM if len(module.normalized_shape) == 1 else None
    return _norm_kind(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of `module` holds codes instead of ordinary numbers.

    True for bitsandbytes, torchao and 8 bit floating point weights; their rows cannot be read or written in place.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    if not weight.is_floating_point() or weight.element_size() == 1:
        return True
    # bitsandbytes may store codes in a floating point dtype, torchao's tensors have the dtype of the decoded values.
    return type(weight).__name__ == "Params4bit" or type(weight).__module__.startswith("torchao.")


def features(module: nn.Module) -> tuple[int, int]:
    """Number of inputs I and number of channels C of a module that has a `channel_kind`; for a norm, C twice.

    Raises:
        ActTypeError: the module has none.
    """
    kind = kind_of(module)
    if kind is ChannelKind.LINEAR and is_quantized(module):
        return cast(int, module.in_features), cast(int, module.out_features)
    shape = full_shape(weight_of(module))
    return int(shape[0 if kind.is_norm else 1 - kind.channel_dim]), int(shape[kind.channel_dim])


def num_channels(module: nn.Module) -> int:
    """Number of channels C of a module that has a `channel_kind`.

    Raises:
        ActTypeError: the module has none.
    """
    return features(module)[1]


def kind_of(module: nn.Module) -> ChannelKind:
    """The `channel_kind` of a module that must have one.

    Raises:
        ActTypeError: the module has none.
    """
    kind = channel_kind(module)
    if kind is None:
        raise ActTypeError(
            f"{type(module).__name__}: has no channels, expected a linear, Conv1D, embedding or norm module with a "
            "floating point weight"
        )
    return kind


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a module that has a `channel_kind`; torch types attributes of modules too loosely."""
    return cast(torch.Tensor, module.weight)


def _norm_kind(module: nn.Module) -> ChannelKind | None:
    """Recognise norm modules by their results: `y[i] = normalized(x)[i] * (constant + weight[i]) + ...`.

    Models bring their own norm classes (weight or 1 + weight, float32 inside or not). A copy of the module with
    parameters of its own runs on a few random inputs; the user's module is neither called nor changed.
    """
    parameters = dict(module.named_parameters())
    shapes = [full_shape(parameter) for parameter in parameters.values()]
    if set(parameters) not in ({"weight"}, {"weight", "bias"}) or any(len(shape) != 1 for shape in shapes):
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    if type(module) not in _NORM_KINDS:
        _NORM_KINDS[type(module)] = _probe_norm(module)
    return _NORM_KINDS[type(module)]


_NORM_KINDS: dict[type[nn.Module], ChannelKind | None] = {nn.RMSNorm: ChannelKind.RMS_NORM}
_PROBE_TOLERANCE = 1e-3  # modules that round inside (bfloat16, float32) stay far below, different functions far above


def _probe_norm(module: nn.Module) -> ChannelKind | None:
    (channels,) = full_shape(weight_of(module))
    generator = torch.Generator(device="cpu").manual_seed(0)
    # Device and dtype are explicit because the caller may have changed the defaults (`torch.set_default_dtype`).
    randn = partial(torch.randn, generator=generator, device="cpu", dtype=torch.float32)
    x, weight, change = randn(4, channels) * 3 + 1, randn(channels), randn(channels)
    try:
        probe = copy.copy(module)
        zeros = {name: torch.zeros_like(weight) for name, _ in module.named_parameters()}
        probe._parameters = {name: nn.Parameter(values) for name, values in zeros.items()}
        probe.training = False
        with torch.no_grad():
            weight_of(probe).copy_(weight)
            # The class's `forward`: calling the copy would run the user's hooks, and its own may belong to the module.
            before = type(probe).forward(probe, x)
            weight_of(probe).add_(change)
            difference = type(probe).forward(probe, x) - before
    except Exception:  # a module that takes different inputs is no norm
        return None
    if not isinstance(difference, torch.Tensor) or difference.shape != x.shape:
        return None
    for kind in (ChannelKind.RMS_NORM, ChannelKind.LAYER_NORM):
        expected = normalize(x, kind, norm_epsilon(module)) * change
        if torch.allclose(difference, expected, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE):
            return kind
    return None
