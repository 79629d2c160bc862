"""Keeping a skill while another is learned: on its data the base model itself is the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import TrainerCallback

from act_peft.batches.predictions import Predictions, find_predictions, logits_of
from act_peft.checks import finite_number, whole_number
from act_peft.errors import ActError, ActTypeError, ActValueError
from act_peft.training.scales import add_to_log


class KeepCallback(TrainerCallback):
    """Pulls a model that trains on one thing towards the base's answers on another, in any Trainer.

    Before each optimizer step a batch of the data to keep is run twice, with the adapters off (the base) and on, and
    the gradient of

        weight * mean over the answer tokens of KL(base's next token || model's next token)

    joins that of the Trainer's own loss, before gradients are clipped (learning without forgetting, arXiv 1606.09282,
    with the base at hand for nothing). What the base finds second best and third best says more about it than the
    right answers do, so fewer examples hold on to more. The labels only say which tokens count. Costs one forward
    pass without gradients and one forward and backward pass with, each on one batch a step.

    For language models with any PEFT method whose adapters leave the base as it is when they are off. With several
    adapters the base is the model without all of them. A resumed training goes on with the batch that it would have
    come to, provided that the callback was new when that training began.

    Every log of the Trainer gets `keep_divergence`: the mean divergence since the last log, in nats a token.
    Callbacks that the Trainer calls before this one (those of `report_to`) find it in `state.log_history`.

    Args:
        keep_dataloader: batches (dicts) that the model accepts, as for `localize`; begun again whenever it ends. With
            DistributedDataParallel every process has its own, as the Trainer's `get_train_dataloader()` gives it.
        weight: of this loss beside the Trainer's, above 0.
        batches_per_step: how many batches, one after the other, whose divergences are averaged; for models of which
            one batch is as much as memory holds.

    Raises:
        ActTypeError: no iterable of batches.
        ActValueError: a weight that is not a finite number above 0, fewer than one batch. When the training begins:
            a model without adapters to switch off, prompt learning, trained biases of the base; float16 with a scaled
            loss, DeepSpeed, FSDP. While it runs: no batch, a batch without an answer token, a model without logits, a
            divergence that is not finite.
    """

    def __init__(
        self, keep_dataloader: Iterable[Mapping[str, Any]], weight: float = 1.0, batches_per_step: int = 1
    ) -> None:
        if not isinstance(keep_dataloader, Iterable) or isinstance(keep_dataloader, Mapping):
            raise ActTypeError(
                f"keep_dataloader: got {type(keep_dataloader).__name__}, expected an iterable of batches (put one "
                "batch into a list)"
            )
        if isinstance(keep_dataloader, Iterator):
            raise ActTypeError(
                f"keep_dataloader: got {type(keep_dataloader).__name__}, expected something that can be gone through "
                "again and again (a DataLoader or a list of batches, no generator)"
            )
        self.weight = finite_number(weight, "weight", above=0)
        self.batches_per_step = whole_number(batches_per_step, "batches_per_step", least=1)
        self._dataloader = keep_dataloader
        self._batches: Iterator[Mapping[str, Any]] | None = None
        self._number = 0  # of the next batch in this round through the data
        self._drawn = 0  # batches in all
        self._divergences: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the base can be asked and the gradient can be added, before the first step."""
        model = kwargs["model"]
        if not isinstance(model, PeftModel):
            raise ActValueError(
                f"KeepCallback: got {type(model).__name__}, expected a PeftModel, whose adapters can be switched off "
                "(get_peft_model(model, ActConfig(...)))"
            )
        for name, config in model.peft_config.items():
            trained_biases = getattr(config, "bias", "none")
            if config.is_prompt_learning or trained_biases != "none":
                what = f"bias={trained_biases!r}" if trained_biases != "none" else str(config.peft_type.value)
                raise ActValueError(
                    f"KeepCallback: got adapter {name!r} with {what}, expected one that leaves the base and its "
                    "outputs' shape as they are when it is off (LoRA with bias='none', ACT)"
                )
        reason = _other_backward(model, kwargs["optimizer"])
        if reason is not None:
            raise ActValueError(
                f"KeepCallback: got {reason}, expected bf16 or float32 on one device or with DistributedDataParallel, "
                "and an optimizer of all that trains (its gradient is added outside the Trainer's own backward pass)"
            )
        while self._drawn < state.global_step * self.batches_per_step:  # a resumed training
            self._next()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the gradient where those of the Trainer's batches will be added."""
        model = kwargs["model"]
        for _ in range(self.batches_per_step):
            batch = self._predictions()
            wanted = _answers_of_base(model, batch)
            model.train()
            divergence = _divergence(wanted, _log_probabilities(model, batch))
            (self.weight / self.batches_per_step * divergence).backward()
            self._divergences.append(divergence.detach())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the mean divergence since the last log."""
        if self._divergences:
            figures = {"keep_divergence": float(torch.stack(self._divergences).mean())}
            self._divergences.clear()
            add_to_log(figures, state=state, logs=logs)

    def _predictions(self) -> Predictions:
        batch, number = self._next(), self._number - 1
        try:
            return find_predictions(batch)
        except ActError as error:
            raise type(error)(f"keep_dataloader: batch {number}: {error}") from error

    def _next(self) -> Mapping[str, Any]:
        """The next batch, the first again after the last."""
        for _ in range(2):
            if self._batches is None:
                self._batches, self._number = iter(self._dataloader), 0
            for batch in self._batches:
                self._number += 1
                self._drawn += 1
                return batch
            self._batches = None
        raise ActValueError("keep_dataloader: got no batch, expected at least one (is the dataset empty?)")


def _answers_of_base(model: PeftModel, batch: Predictions) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), _same_gradients(model), model.disable_adapter():
        return _log_probabilities(model, batch)


def _other_backward(model: nn.Module, optimizer: Any) -> str | None:
    """Why gradients that are added to those of the model's parameters would not be what the optimizer works with."""
    if getattr(optimizer, "scaler", None) is not None:
        return "float16 with a scaled loss"
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(isinstance(parameter, DTensor) or id(parameter) not in held for parameter in training):
        return (
            "an optimizer without some of the parameters that train (of DeepSpeed or FSDP; of a Trainer made before "
            "prune_channels, which takes a new one; of a choice of parameters, whose others are to be frozen)"
        )
    return None


@contextmanager
def _same_gradients(model: nn.Module) -> Iterator[None]:
    """What trains before is what trains afterwards; PEFT lets all active adapters train when it switches them on."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad_(required)


def _divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Mean over N of KL(wanted || found), of log-probabilities `[N, V]`; what the base excludes (-inf) counts nothing.

    Raises:
        ActValueError: it is not finite.
    """
    terms = F.kl_div(found, wanted, reduction="none", log_target=True).masked_fill(wanted.isneginf(), 0.0)
    divergence = terms.sum() / len(wanted)
    if not torch.isfinite(divergence):
        raise ActValueError(
            f"KeepCallback: the divergence from the base's answers is {float(divergence.detach())}, expected a finite "
            "number (did the training diverge? try a lower learning rate)"
        )
    return divergence


def _log_probabilities(model: nn.Module, batch: Predictions) -> torch.Tensor:
    logits = logits_of(model, batch)
    return logits.index_select(0, batch.positions.to(logits.device)).float().log_softmax(-1)  # [N, V]
