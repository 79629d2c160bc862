"""Learned transfer scales: what keeps them sparse while they train, and what makes an ordinary adapter of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from act_peft.checks import finite_number, number
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers import ActLayer

_UNBOUNDED = (-math.inf, math.inf)


def soft_threshold_(scales: torch.Tensor, threshold: float, *, bounds: tuple[float, float] = _UNBOUNDED) -> None:
    """The proximal step of an L1 penalty, in place, followed by the bounds.

        s <- clamp(sign(s) * max(|s| - threshold, 0), *bounds)

    Args:
        scales: any shape; small ones become exactly zero.
        threshold: learning rate times weight of the penalty, at least 0.
        bounds: the smallest and the greatest value allowed.
    """
    with torch.no_grad():
        scales.copy_(torch.nn.functional.softshrink(scales, threshold).clamp_(*bounds))


class ScaleSparsityCallback(TrainerCallback):
    """Keeps the scales of `ActConfig(trainable="scales")` or `"both"` sparse and in bounds, in any Trainer.

    After each optimizer step the proximal step of an L1 penalty is made, with the learning rate η of this step, and
    then the bounds are enforced:

        s_i <- min(max(sign(s_i) * max(|s_i| - η * l1, 0), low), high)

    so that scales become exactly zero, which `prune_channels` drops. A scale that the loss does not hold sinks by
    η * l1 a step. With the bounds [0, 1] every channel stays between base and donor, which is what makes it a transfer
    rather than a fine-tune.

    Every log of the Trainer gets `scale_density` (share of the scales that are not zero), `scale_mean`, and
    `scale_density/KIND` for each kind of module; callbacks that the Trainer calls before this one (those of
    `report_to`) find them in `state.log_history`.

    Args:
        l1: weight of the penalty, at least 0; 0 enforces the bounds alone. With Adam at a learning rate of 0.05 and a
            hundred steps, 0.05 to 0.2 leave about half of the scales.
        bounds: the smallest and the greatest scale.

    Raises:
        ActValueError: a negative or infinite penalty, bounds that are not ascending; when the training begins: no
            scale trains.
    """

    def __init__(self, l1: float, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        self.l1 = finite_number(l1, "l1", least=0)
        expected = "two ascending numbers, such as (0, 1)"
        if not isinstance(bounds, (tuple, list)):
            raise ActTypeError(f"bounds: got {bounds!r:.80}, expected {expected}")
        limits = [number(bound, "bounds", expected=expected) for bound in bounds]  # infinite ones are allowed
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ActValueError(f"bounds: got {bounds!r:.80}, expected {expected}")
        self.bounds = (limits[0], limits[1])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that there is something to do, before the first step."""
        training = [
            (layer, name) for layer, name in _adapters(kwargs["model"]) if _scales_of(layer, name).requires_grad
        ]
        if not training:
            raise ActValueError(
                "ScaleSparsityCallback: no scale trains, expected a model with ActConfig(trainable='scales') or "
                "'both' (a saved one is to be loaded with is_trainable=True)"
            )
        rows = [layer.act_delta_weight[name] for layer, name in training]
        if not any(weight.requires_grad or bool(weight.any()) for weight in rows):
            raise ActValueError(
                "ScaleSparsityCallback: all frozen differences are zero, expected those of a donor "
                "(ActConfig(donor=...), or initialize_from_donor)"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Threshold and bounds, after the optimizer has made its step and before the learning rate changes."""
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):  # gradients that overflowed in float16
            return
        rates = {
            id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]
        }
        for layer, name in _adapters(kwargs["model"]):
            scales = _scales_of(layer, name)
            if not scales.requires_grad:
                continue
            if id(scales) not in rates:
                raise ActValueError(
                    "ScaleSparsityCallback: the optimizer has none of the scales, expected the model's own parameters "
                    "in it (one device or DistributedDataParallel; DeepSpeed and FSDP train copies)"
                )
            soft_threshold_(scales, rates[id(scales)] * self.l1, bounds=self.bounds)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add density and mean to what is logged."""
        add_to_log(describe_scales(kwargs["model"]), state=state, logs=logs)


def describe_scales(model: nn.Module) -> dict[str, float]:
    """Density and mean of the scales of a model that train: `scale_density`, `scale_mean`, `scale_density/KIND`."""
    groups: dict[str, list[torch.Tensor]] = {}
    for layer, name in _adapters(model):
        scales = _scales_of(layer, name)
        if scales.requires_grad:
            groups.setdefault(layer.kind.value.replace(" ", "_"), []).append(scales.detach().flatten().float().cpu())
    if not groups:
        return {}
    everything = torch.cat([scales for group in groups.values() for scales in group])
    densities = {f"scale_density/{kind}": _density(torch.cat(group)) for kind, group in sorted(groups.items())}
    return {"scale_density": _density(everything), "scale_mean": float(everything.mean()), **densities}


def _density(scales: torch.Tensor) -> float:
    return float((scales != 0).float().mean())


def _adapters(model: nn.Module) -> Iterator[tuple[ActLayer, str]]:
    """The layers with learned scales, each with the names of the adapters that have them."""
    for module in model.modules():
        if isinstance(module, ActLayer):
            for name in module.act_delta_channel_scale:
                yield module, name


def _scales_of(layer: ActLayer, adapter_name: str) -> nn.Parameter:
    return cast(nn.Parameter, layer.act_delta_channel_scale[adapter_name])


def add_to_log(figures: Mapping[str, float], *, state: Any, logs: dict[str, Any] | None) -> None:
    """Add figures to what a Trainer is about to log; to be called in a callback's `on_log`.

    Args:
        figures: name -> value.
        state: the Trainer's state, whose history has its entry already.
        logs: what the callbacks after this one see.
    """
    if logs is not None:
        logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)
