"""Keep a skill during the training of another one: on data of this skill the base model is the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from act_peft.peft_modules import same_gradients
from act_peft.training.scales import add_to_log


class KeepCallback(TrainerCallback):
    """Keep a skill of the base while the model trains on different data, in any Trainer.

    Before each optimizer step the model runs twice on a batch of the data to keep: with the adapters off (the base)
    and on. The gradient of

        weight * mean over the answer tokens of KL(base's next token || model's next token)

    is added to the gradient of the Trainer's loss before gradients are clipped (learning without forgetting, arXiv
    1606.09282; the base needs no second model). The probabilities of the base hold more information than the right
    answers alone, so few examples are enough. The labels only decide which tokens count. The cost per step and batch
    is one forward pass without gradients and one forward and backward pass.

    It works for language models with any PEFT method that does not change the base when its adapters are off. With
    several adapters the base is the model without all of them. A resumed training continues with the next batch, if
    the callback was new when the training began.

    Every log of the Trainer gets `keep_divergence`: the mean divergence since the last log, in nats per token.
    Callbacks that the Trainer calls before this one (those of `report_to`) find it in `state.log_history`.

    Args:
        keep_dataloader: batches (dicts) that the model accepts, as for `localize`. At its end it starts again. With
            DistributedDataParallel every process needs its own part, as the Trainer's `get_train_dataloader()` gives.
        weight: factor of this loss, relative to the Trainer's loss; above 0.
        batches_per_step: number of batches per step, run one after the other; the divergences are averaged. For
            models with memory for small batches only.

    Raises:
        ActTypeError: no iterable of batches, a weight or number of batches that is no number.
        ActValueError: a weight that is not finite or not above 0, fewer than one batch per step. At the start of the
            training: a model without adapters to switch off, prompt learning, trained biases of the base, float16
            with a scaled loss, DeepSpeed, FSDP. During the training: no batch, a batch without an answer token, a
            model without logits, a divergence that is not finite.

    Example:
        >>> model = get_peft_model(base, ActConfig(channels=mask, donor=DONOR, task_type="CAUSAL_LM"))
        >>> arguments = TrainingArguments("training", max_steps=2, report_to="none", use_cpu=True)
        >>> keep = KeepCallback(batches, weight=0.5)
        >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[keep])
        >>> trainer.train()
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
                f"keep_dataloader: got {type(keep_dataloader).__name__}, expected batches that can be "
                "read repeatedly (a DataLoader or a list of batches, no generator)"
            )
        self.weight = finite_number(weight, "weight", above=0)
        self.batches_per_step = whole_number(batches_per_step, "batches_per_step", least=1)
        self._dataloader = keep_dataloader
        self._batches: Iterator[Mapping[str, Any]] | None = None
        self._number = 0  # of the next batch in this pass over the data
        self._drawn = 0  # total number of batches so far
        self._divergences: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check before the first step that the adapters can be switched off and the gradient can be added."""
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
                    f"KeepCallback: got adapter {name!r} with {what}, expected one that leaves the base and the "
                    "shape of its outputs unchanged when it is off (LoRA with bias='none', ACT)"
                )
        reason = _unsupported_training(model, kwargs["optimizer"])
        if reason is not None:
            raise ActValueError(
                f"KeepCallback: got {reason}, expected bf16 or float32 on one device or with DistributedDataParallel, "
                "and an optimizer with all trained parameters (the gradient is added outside the Trainer's own)"
            )
        while self._drawn < state.global_step * self.batches_per_step:  # a resumed training
            self._next()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compute the gradient; the Trainer's gradients are added to it."""
        model = kwargs["model"]
        for _ in range(self.batches_per_step):
            batch = self._predictions()
            target = _base_log_probabilities(model, batch)
            model.train()
            divergence = _divergence(target, _log_probabilities(model, batch))
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
        """The next batch; after the last one, the first."""
        for _ in range(2):
            if self._batches is None:
                self._batches, self._number = iter(self._dataloader), 0
            for batch in self._batches:
                self._number += 1
                self._drawn += 1
                return batch
            self._batches = None
        raise ActValueError("keep_dataloader: got no batch, expected at least one (is the dataset empty?)")


def _base_log_probabilities(model: PeftModel, batch: Predictions) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), same_gradients(model), model.disable_adapter():
        return _log_probabilities(model, batch)


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


def _divergence(target: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Mean over N of KL(target || model), from log-probabilities `[N, V]`; tokens with target -inf add nothing.

    Raises:
        ActValueError: it is not finite.
    """
    terms = F.kl_div(model, target, reduction="none", log_target=True).masked_fill(target.isneginf(), 0.0)
    divergence = terms.sum() / len(target)
    if not torch.isfinite(divergence):
        raise ActValueError(
            f"KeepCallback: the divergence from the base's answers is {float(divergence.detach())}, expected a finite "
            "number (did the training diverge? try a lower learning rate)"
        )
    return divergence


def _log_probabilities(model: nn.Module, batch: Predictions) -> torch.Tensor:
    logits = logits_of(model, batch)
    return logits.index_select(0, batch.positions.to(logits.device)).float().log_softmax(-1)  # [N, V]
