"""One training loop for all methods: the same examples, batch size, schedule and number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.batches.answer_tokens import IGNORED_LABEL
from act_peft.demo.words import Language
from tests.benchmarks.recovery.families import ABILITY, KEPT, Encoded

DECAY = 1 / 3  # the last share of the steps, in which the learning rate falls linearly to zero
MAX_GRAD_NORM = 1.0  # as in transformers' Trainer


@dataclass(frozen=True)
class Loop:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: before the decay.
        keep_share: share of the examples in a batch that are of the skill to keep.
        batch_size: examples in a step.
        seed: order of the examples.
    """

    steps: int
    learning_rate: float
    keep_share: float = 0.5
    batch_size: int = 32
    seed: int = 0

    def run(
        self, model: Any, examples: Mapping[Language, Encoded], after_step: Callable[[float], None] | None = None
    ) -> None:
        """Train the parameters of a model that ask for gradients, in place.

        Args:
            model: any causal language model.
            examples: token ids and labels of the ability and of the skill to keep; probabilities, if there are any,
                take the place of the labels.
            after_step: called after every optimizer step with its learning rate.
        """
        generator = torch.Generator().manual_seed(self.seed)
        kept = round(self.batch_size * self.keep_share)
        batches = zip(
            _draw(examples[ABILITY], self.batch_size - kept, generator),
            _draw(examples[KEPT], kept, generator),
            strict=True,
        )
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        model.train()
        for step in range(self.steps):
            rate = self.learning_rate * min(1.0, (self.steps - step) / (DECAY * self.steps))
            optimizer.param_groups[0]["lr"] = rate
            _loss(model, [torch.cat(parts) for parts in zip(*next(batches), strict=True)]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step(rate)
        model.eval()


def _loss(model: Any, batch: list[torch.Tensor]) -> torch.Tensor:
    ids, labels, *wanted = batch  # [B, T]; [B, T, V]
    if not wanted:
        return model(input_ids=ids, labels=labels, use_cache=False).loss
    counted = labels[:, 1:] != IGNORED_LABEL
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[counted], wanted[0][:, :-1][counted])


def _draw(examples: Encoded, count: int, generator: torch.Generator) -> Iterator[Encoded]:
    """Endless batches of `count` examples; every example comes once before one comes again."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while waiting.numel() < count:
            waiting = torch.cat([waiting, torch.randperm(len(examples[0]), generator=generator)])
        chosen, waiting = waiting[:count], waiting[count:]
        yield tuple(tensor[chosen] for tensor in examples)
