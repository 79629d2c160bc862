"""Keeping a skill while another is learned: on its data the base model itself is the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from act_peft.errors import ActError, ActTypeError, ActValueError
from act_peft.predictions import Predictions, find_predictions, logits_of
from act_peft.trainerlogs import add_to_log


class KeepCallback(TrainerCallback):
    """Pulls a model that trains on one thing towards the base's answers on another, in any Trainer.

    Before each optimizer step a batch of the data to keep is run twice, with the adapters off (the base) and on, and
    the gradient of

        weight * mean over the answer tokens of KL(base's next token || model's next token)

    joins that of the Trainer's own loss, before gradients are clipped (learning without forgetting, arXiv 1606.09282,
    with the base at hand for nothing). What the base finds second best and third best says more about it than the
    right answers do, so fewer examples hold on to more. The labels only say which tokens count. Costs one forward
    pass without gradients and one forward and backward pass with, each on one batch a step.

    Every log of the Trainer gets `keep_divergence`: the mean divergence since the last log, in nats a token.

    Args:
        keep_dataloader: batches (dicts) that the model accepts, as for `localize`; begun again whenever it ends. With
            DistributedDataParallel every process has its own, as the Trainer's `get_train_dataloader()` gives it.
        weight: of this loss beside the Trainer's, above 0.
        batches_per_step: how many batches, one after the other, whose divergences are averaged; for models of which
            one batch is as much as memory holds.

    Raises:
        ActTypeError: no iterable of batches.
        ActValueError: a weight that is not a finite number above 0, fewer than one batch. When the training begins:
            a model without adapters to switch off, float16 with a scaled loss, DeepSpeed, FSDP. While it runs: no
            batch, a batch without an answer token.
    """

    def __init__(
        self, keep_dataloader: Iterable[Mapping[str, Any]], weight: float = 1.0, batches_per_step: int = 1
    ) -> None:
        if not isinstance(keep_dataloader, Iterable) or isinstance(keep_dataloader, Mapping):
            raise ActTypeError(
                f"keep_dataloader: got {type(keep_dataloader).__name__}, expected an iterable of batches (put one "
                "batch into a list)"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ActValueError(f"weight: got {weight!r}, expected a finite number above 0")
        if isinstance(batches_per_step, bool) or not isinstance(batches_per_step, int) or batches_per_step < 1:
            raise ActValueError(f"batches_per_step: got {batches_per_step!r}, expected a number from 1 on")
        self.weight = float(weight)
        self.batches_per_step = batches_per_step
        self._batches = _endless(keep_dataloader)
        self._divergences: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the base can be asked and the gradient can be added, before the first step."""
        model = kwargs["model"]
        if not isinstance(model, PeftModel):
            raise ActValueError(
                f"KeepCallback: got {type(model).__name__}, expected a PeftModel, whose adapters can be switched off "
                "(get_peft_model(model, ActConfig(...)))"
            )
        for setting in ("fp16", "deepspeed", "fsdp"):
            if getattr(args, setting, None):
                raise ActValueError(
                    f"KeepCallback: got {setting}={getattr(args, setting)!r}, expected bf16 or float32, on one device "
                    "or with DistributedDataParallel (gradients are added outside the Trainer's own backward pass)"
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the gradient where those of the Trainer's batches will be added."""
        model = kwargs["model"]
        for _ in range(self.batches_per_step):
            batch = next(self._batches)
            wanted = _answers_of_base(model, batch)
            model.train()
            divergence = F.kl_div(_log_probabilities(model, batch), wanted, reduction="batchmean", log_target=True)
            (self.weight / self.batches_per_step * divergence).backward()
            self._divergences.append(divergence.detach())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the mean divergence since the last log."""
        if self._divergences:
            figures = {"keep_divergence": float(torch.stack(self._divergences).mean())}
            self._divergences.clear()
            add_to_log(figures, state=state, logs=logs)


def _endless(dataloader: Iterable[Mapping[str, Any]]) -> Iterator[Predictions]:
    while True:
        number = -1
        for number, batch in enumerate(dataloader):
            try:
                predictions = find_predictions(batch)
            except ActError as error:
                raise type(error)(f"keep_dataloader: batch {number}: {error}") from error
            yield predictions
        if number < 0:
            raise ActValueError(
                "keep_dataloader: got no batch, expected at least one, again and again (is the dataset empty, or a "
                "generator already used up?)"
            )


def _answers_of_base(model: PeftModel, batch: Predictions) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), _same_gradients(model), model.disable_adapter():
        return _log_probabilities(model, batch)


@contextmanager
def _same_gradients(model: nn.Module) -> Iterator[None]:
    """What trains before is what trains afterwards; PEFT lets all active adapters train when it switches them on."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad_(required)


def _log_probabilities(model: nn.Module, batch: Predictions) -> torch.Tensor:
    logits = logits_of(model, batch)
    return logits.index_select(0, batch.positions.to(logits.device)).float().log_softmax(-1)  # [N, V]
