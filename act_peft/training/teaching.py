"""What the callbacks of both teachers share: batches, the gradient of a divergence, its place in a Trainer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import TrainerCallback

from act_peft.batches.predictions import Predictions, find_predictions
from act_peft.checks import finite_number, whole_number
from act_peft.errors import ActError, ActTypeError, ActValueError
from act_peft.training.answer_logits import AnswerLogits
from act_peft.training.scales import add_to_log
from act_peft.training.teacher import Teacher


class TeachingCallback(TrainerCallback, ABC):
    """Adds the gradient of weight * mean KL(teacher || model) over answer tokens to that of the Trainer's loss.

    Args:
        dataloader: batches that the model accepts.
        weight: factor of this loss.
        batches_per_step: number of batches for each optimizer step.
        max_cached_tokens: the greatest number of answer tokens whose hidden states are kept.
    """

    argument: str
    """Name of the argument with the batches."""
    figure: str
    """Name of the divergence in the logs."""
    teacher_name: str
    """What messages call the teacher."""

    def __init__(self, dataloader: Any, weight: float, batches_per_step: int, max_cached_tokens: int) -> None:
        if not isinstance(dataloader, Iterable) or isinstance(dataloader, Mapping):
            raise ActTypeError(
                f"{self.argument}: got {type(dataloader).__name__}, expected an iterable of batches (put one "
                "batch into a list)"
            )
        if isinstance(dataloader, Iterator):
            raise ActTypeError(
                f"{self.argument}: got {type(dataloader).__name__}, expected batches that can be "
                "read repeatedly (a DataLoader or a list of batches, no generator)"
            )
        self.weight = finite_number(weight, "weight", above=0)
        self.batches_per_step = whole_number(batches_per_step, "batches_per_step", least=1)
        self.max_cached_tokens = whole_number(max_cached_tokens, "max_cached_tokens", least=0)
        self._dataloader = dataloader
        self._batches: Iterator[Mapping[str, Any]] | None = None
        self._number = 0  # of the next batch in this pass over the data
        self._drawn = 0  # total number of batches so far
        self._divergences: list[torch.Tensor] = []
        self._teacher: Teacher
        self._student: AnswerLogits

    @abstractmethod
    def _open_teacher(self, model: nn.Module, student: AnswerLogits) -> Teacher:
        """Check what is trained and make the teacher, before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check before the first step that there is a teacher and that the gradient can be added."""
        model = kwargs["model"]
        reason = _unsupported_training(model, kwargs["optimizer"])
        if reason is not None:
            raise ActValueError(
                f"{type(self).__name__}: got {reason}, expected bf16 or float32 on one device or with "
                "DistributedDataParallel, and an optimizer with all trained parameters (the gradient is added outside "
                "the Trainer's own)"
            )
        self._student = AnswerLogits(model)
        self._teacher = self._open_teacher(model, self._student)
        while self._drawn < state.global_step * self.batches_per_step:  # a resumed training
            self._next()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compute the gradient; the Trainer's gradients are added to it."""
        model = kwargs["model"]
        for _ in range(self.batches_per_step):
            batch = self._find(self._next(), self._number - 1)
            teacher = self._teacher.logits(batch)
            model.train()
            divergence = self._divergence(teacher, self._student(batch))
            (self.weight / self.batches_per_step * divergence).backward()
            self._divergences.append(divergence.detach())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the mean divergence since the last log."""
        if self._divergences:
            figures = {self.figure: float(torch.stack(self._divergences).mean())}
            self._divergences.clear()
            add_to_log(figures, state=state, logs=logs)

    def _divergence(self, teacher: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        divergence = mean_divergence(teacher.to(model.device), model)
        if not torch.isfinite(divergence):
            raise ActValueError(
                f"{type(self).__name__}: the divergence from the {self.teacher_name}'s answers is "
                f"{float(divergence.detach())}, expected a finite number (did the training diverge? try a lower "
                "learning rate)"
            )
        return divergence

    def _find(self, batch: Mapping[str, Any], number: int) -> Predictions:
        """The answer tokens of a batch."""
        try:
            self._check(batch)
            return find_predictions(batch)
        except ActError as error:
            raise type(error)(f"{self.argument}: batch {number}: {error}") from error

    def _check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that the teacher cannot read."""

    def _next(self) -> Mapping[str, Any]:
        """The next batch; after the last one, the first."""
        for _ in range(2):
            if self._batches is None:
                self._batches, self._number = iter(self._dataloader), 0
            for batch in self._batches:
                self._number += 1
                self._drawn += 1
                return batch
            self._batches = None
        raise ActValueError(f"{self.argument}: got no batch, expected at least one (is the dataset empty?)")


def mean_divergence(teacher: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Mean over N of KL(teacher || model), from logits `[N, V]`, in float32.

    If one of them has more tokens than the other, the first ones, common to both, are compared. Tokens that the
    teacher excludes add nothing.
    """
    common = min(teacher.shape[-1], model.shape[-1])
    target = teacher[:, :common].float().log_softmax(-1)
    answer = model[:, :common].float().log_softmax(-1)
    terms = F.kl_div(answer, target, reduction="none", log_target=True).masked_fill(target.isneginf(), 0.0)
    return terms.sum() / len(target)


def _unsupported_training(model: nn.Module, optimizer: Any) -> str | None:
    """The reason why the optimizer would not see gradients added to the model's parameters, if there is one."""
    if getattr(optimizer, "scaler", None) is not None:
        return "float16 with a scaled loss"
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(isinstance(parameter, DTensor) or id(parameter) not in held for parameter in training):
        return (
            "an optimizer without some of the trained parameters (it is one of DeepSpeed or FSDP; or the Trainer is "
            "older than prune_channels: make a new one; or it trains a part of them: freeze the rest)"
        )
    return None
