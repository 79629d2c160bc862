"""A model on the straight line from the base to the donor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from act_peft.localize.adapters import named_modules, twin
from act_peft.localize.parameters import ParameterPair

OnGradient = Callable[[str, torch.Tensor, ParameterPair], None]


class InterpolatedModel:
    """A twin of the base whose candidates stand at `base + alpha * (donor - base)`; only these get gradients.

    The candidates' parameters are the twin's own, a module's each, so tied weights get the gradient of their own use
    only. Neither base nor donor is written to. A gradient is handed over and freed as soon as it is there, so the
    gradients of one module are in memory at a time.

    Args:
        base: a plain model.
        pairs: candidate -> its parameters in base and donor.
        on_gradient: called with the candidate's name, the gradient and the pair that it belongs to, of one shape.
    """

    def __init__(self, base: nn.Module, pairs: Mapping[str, Sequence[ParameterPair]], on_gradient: OnGradient) -> None:
        self.model = twin(base)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        modules = dict(named_modules(self.model))
        self._moving: list[tuple[nn.Parameter, ParameterPair]] = []
        for name, parts in pairs.items():
            for pair in parts:
                module = modules[name].layer
                own = nn.Parameter(getattr(module, pair.part).detach().clone())
                module._parameters[pair.part] = own
                own.register_post_accumulate_grad_hook(_handing_over(name, pair, on_gradient))
                self._moving.append((own, pair))

    def move_(self, alpha: float) -> None:
        """Go to `base + alpha * (donor - base)`, rounded to the base's dtype."""
        with torch.no_grad():
            for parameter, pair in self._moving:
                wide = torch.promote_types(torch.promote_types(pair.base.dtype, pair.donor.dtype), torch.float32)
                start, end = (tensor.to(parameter.device, wide) for tensor in (pair.base, pair.donor))
                _common(parameter, pair).copy_(torch.lerp(start, end, alpha))


def _handing_over(name: str, pair: ParameterPair, on_gradient: OnGradient) -> Callable[[torch.Tensor], None]:
    def hand_over(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            on_gradient(name, _common(gradient, pair), pair)

    return hand_over


def _common(tensor: torch.Tensor, pair: ParameterPair) -> torch.Tensor:
    """The part of a parameter, or of its gradient, that a pair covers."""
    return tensor[tuple(slice(0, size) for size in pair.base.shape)]
