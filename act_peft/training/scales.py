"""Learned scales: a callback that keeps them sparse during training, and their figures in the log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from act_peft.checks import finite_number, number
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers import ActLayer
from act_peft.layers.lookup import act_layers
from act_peft.shards import own_part, whole

_UNBOUNDED = (-math.inf, math.inf)


def soft_threshold_(scales: torch.Tensor, threshold: float, *, bounds: tuple[float, float] = _UNBOUNDED) -> None:
    """The proximal step of an L1 penalty, in place, followed by the bounds.

        s <- clamp(sign(s) * max(|s| - threshold, 0), *bounds)

    Args:
        scales: any shape; small ones become exactly zero.
        threshold: learning rate times weight of the penalty, at least 0.
        bounds: the smallest and the greatest allowed value.
    """
    values = own_part(scales)
    with torch.no_grad():
        values.copy_(torch.nn.functional.softshrink(values, threshold).clamp_(*bounds))


class ScaleSparsityCallback(TrainerCallback):
    """Keep the learned scales of `ActConfig(trainable="scales")` or `"both"` sparse and in bounds, in any Trainer.

    After each optimizer step follow the proximal step of an L1 penalty, with the learning rate η of this step, and
    the bounds:

        s_i <- min(max(sign(s_i) * max(|s_i| - η * l1, 0), low), high)

    So learned scales become exactly zero, and `prune_channels` can remove their channels. A scale without a gradient
    shrinks by η * l1 in every step. With the bounds [0, 1] every channel stays between base and donor: it is a
    transfer, not a fine-tune.

    Every log of the Trainer gets `scale_density` (share of the scales that are not zero), `scale_mean`, and
    `scale_density/KIND` for each kind of module; callbacks that the Trainer calls before this one (those of
    `report_to`) find them in `state.log_history`.

    Args:
        l1: weight of the penalty, at least 0; with 0 only the bounds apply. With Adam, a learning rate of 0.05 and a
            hundred steps, 0.05 to 0.2 leave about half of the scales.
        bounds: the smallest and the greatest learned scale; they may be infinite.

    Raises:
        ActTypeError: a penalty or bounds that are no numbers.
        ActValueError: a negative or infinite penalty, bounds that are not ascending. At the start of the training: no
            learned scale is trained.

    Example:
        >>> config = ActConfig(channels=mask, donor=DONOR, trainable="scales", task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        >>> arguments = TrainingArguments("training", max_steps=2, learning_rate=0.05, report_to="none", use_cpu=True)
        >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[ScaleSparsityCallback(0.1)])
        >>> trainer.train()
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
        """Check before the first step that there are learned scales and differences."""
        training = [
            (layer, name) for layer, name in _adapters(kwargs["model"]) if _scales_of(layer, name).requires_grad
        ]
        if not training:
            raise ActValueError(
                "ScaleSparsityCallback: no learned scale is trained, expected a model with "
                "ActConfig(trainable='scales') or 'both' (load a saved one with is_trainable=True)"
            )
        rows = [layer.act_delta_weight[name] for layer, name in training]
        if not any(weight.requires_grad or bool(whole(weight).any()) for weight in rows):
            raise ActValueError(
                "ScaleSparsityCallback: all frozen differences are zero, expected those of a donor "
                "(ActConfig(donor=...), or initialize_from_donor)"
            )
        if kwargs.get("optimizer") is not None:
            _rates(kwargs["optimizer"], [_scales_of(layer, name) for layer, name in training])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply penalty and bounds, after the step of the optimizer and before the learning rate changes."""
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):  # gradients overflowed in float16
            return
        every = [_scales_of(layer, name) for layer, name in _adapters(kwargs["model"])]
        training = [scales for scales in every if scales.requires_grad]
        for scales, rate in zip(training, _rates(optimizer, training), strict=True):
            soft_threshold_(scales, rate * self.l1, bounds=self.bounds)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add density and mean to the log."""
        add_to_log(describe_scales(kwargs["model"]), state=state, logs=logs)


def _rates(optimizer: Any, training: Sequence[nn.Parameter]) -> list[float]:
    """The learning rate of each of some scales.

    Raises:
        ActValueError: the optimizer does not have one of them.
    """
    rates = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(scales) not in rates for scales in training):
        raise ActValueError(
            "ScaleSparsityCallback: the optimizer has none of the learned scales, expected the parameters of the "
            "model in it (one device, DistributedDataParallel or FSDP2; DeepSpeed and FSDP1 train copies)"
        )
    return [rates[id(scales)] for scales in training]


def describe_scales(model: nn.Module) -> dict[str, float]:
    """Figures of the learned scales that are trained: `scale_density`, `scale_mean`, `scale_density/KIND`."""
    groups: dict[str, list[torch.Tensor]] = {}
    for layer, name in _adapters(model):
        scales = _scales_of(layer, name)
        if scales.requires_grad:
            groups.setdefault(layer.kind.value.replace(" ", "_"), []).append(whole(scales).flatten().float().cpu())
    if not groups:
        return {}
    everything = torch.cat([scales for group in groups.values() for scales in group])
    densities = {f"scale_density/{kind}": _density(torch.cat(group)) for kind, group in sorted(groups.items())}
    return {"scale_density": _density(everything), "scale_mean": float(everything.mean()), **densities}


def _density(scales: torch.Tensor) -> float:
    return float((scales != 0).float().mean())


def _adapters(model: nn.Module) -> Iterator[tuple[ActLayer, str]]:
    """The layers with learned scales, each with the names of its adapters that have them."""
    for layer in act_layers(model).values():
        for name in layer.act_delta_channel_scale:
            yield layer, name


def _scales_of(layer: ActLayer, adapter_name: str) -> nn.Parameter:
    return cast(nn.Parameter, layer.act_delta_channel_scale[adapter_name])


def add_to_log(figures: Mapping[str, float], *, state: Any, logs: dict[str, Any] | None) -> None:
    """Add figures to the log of a Trainer; for a callback's `on_log`.

    Args:
        figures: name -> value.
        state: the Trainer's state; its history already has the entry.
        logs: the figures that later callbacks see.
    """
    if logs is not None:
        logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)
