"""Short fine-tunes: the same rows, batches, number of steps and optimizer for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import answer_logits, padded
from peft import PeftModel
from study import Study
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from act_peft import KeepCallback

ABILITY_ROWS, KEPT_ROWS = 16, 6  # in a step
WARMUP = 5  # steps


@dataclass(frozen=True)
class Recipe:
    """What a fine-tune learns from.

    Attributes:
        rate: Learning rate of AdamW, constant after a short rise.
        steps: Optimizer steps.
        ability: "labels", or "donor": its distribution over the next token.
        kept: "labels", "base": its distribution, or "nothing".
    """

    rate: float
    steps: int
    ability: str = "labels"
    kept: str = "base"


class AnchoredTrainer(Trainer):
    """Loss on the ability plus, unless a callback sees to it, loss on what is kept."""

    def __init__(self, *args: Any, study: Study, recipe: Recipe, own_anchor: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._study, self._recipe, self._own_anchor = study, recipe, own_anchor
        self._kept = study.draws(study.kept(), KEPT_ROWS, "kept")

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> torch.Tensor:
        """The ability's loss, and that of what is kept unless a callback adds its gradient."""
        loss = _loss(model, inputs, self._study.teaching_donor if self._recipe.ability == "donor" else None)
        if self._own_anchor:
            batch = padded(next(self._kept), self._study.pad)
            loss = loss + _loss(model, batch, self._study.teacher if self._recipe.kept == "base" else None)
        return loss


def _loss(model: Any, batch: dict[str, torch.Tensor], teacher: Any) -> torch.Tensor:
    """Cross entropy with the labels, or KL(teacher || model), the mean over the answer tokens, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, wanted = answer_logits(model, batch)
        if teacher is None:
            return F.cross_entropy(logits, wanted)
        with torch.no_grad():
            expected = answer_logits(teacher, batch)[0].log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)


class Checkpoint(TrainerCallback):
    """Calls a function with the model after some of the steps."""

    def __init__(self, actions: Mapping[int, Callable[[Any], None]]) -> None:
        self._actions = actions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what is due after this step."""
        if state.global_step in self._actions:
            self._actions[state.global_step](kwargs["model"])
            kwargs["model"].train()


def fine_tune(
    model: Any,
    study: Study,
    recipe: Recipe,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    base_inside: bool = True,
    after: Mapping[int, Callable[[Any], None]] | None = None,
) -> None:
    """Train what asks for gradients, in place.

    Args:
        model: With or without adapters.
        study: Gives the examples.
        recipe: What is learned.
        callbacks: More of them.
        base_inside: Whether the model without its adapters is the base, so that `KeepCallback` can ask it.
        after: What is done after which step.
    """
    by_callback = recipe.kept == "base" and base_inside and isinstance(model, PeftModel)
    chosen = list(callbacks)
    if by_callback:
        drawn = study.draws(study.kept(), KEPT_ROWS, "kept")
        chosen.append(KeepCallback([padded(next(drawn), study.pad) for _ in range(recipe.steps)]))
    if after:
        chosen.append(Checkpoint(after))
    drawn = study.draws(study.ability(), ABILITY_ROWS, "ability")
    order = [row for _ in range(recipe.steps) for row in next(drawn)]
    arguments = TrainingArguments(
        output_dir=str(study.folder / "trainer"),
        max_steps=recipe.steps,
        per_device_train_batch_size=ABILITY_ROWS,
        learning_rate=recipe.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        weight_decay=0.0,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        seed=study.seed,
    )
    trainer = AnchoredTrainer(
        model,
        args=arguments,
        train_dataset=order,
        data_collator=lambda rows: padded(rows, study.pad),
        callbacks=chosen,
        study=study,
        recipe=recipe,
        own_anchor=recipe.kept != "nothing" and not by_callback,
    )
    trainer.train()
    model.eval()
