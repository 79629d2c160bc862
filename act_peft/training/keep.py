"""Keep a skill during the training of another one: on data of this skill the base model is the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from act_peft.batches.evaluation import evaluation
from act_peft.errors import ActValueError
from act_peft.peft_modules import same_gradients
from act_peft.training.answer_logits import AnswerLogits
from act_peft.training.teacher import Teacher
from act_peft.training.teaching import TeachingCallback


class KeepCallback(TeachingCallback):
    """Keep a skill of the base while the model trains on different data, in any Trainer.

    Before each optimizer step the model runs on a batch of the data to keep. The gradient of

        weight * mean over the answer tokens of KL(base's next token || model's next token)

    is added to the gradient of the Trainer's loss before gradients are clipped (learning without forgetting, arXiv
    1606.09282; the base needs no second model: it is the model with its adapters off). The probabilities of the base
    hold more information than the right answers alone, so few examples are enough. The labels only decide which
    tokens count.

    The base runs once for each sample. Its last hidden states at the answer tokens are kept in CPU memory, in the
    model's dtype. In later rounds over the data only its output layer runs on them. Both models compute logits at the
    answer tokens alone. So from the second round on a batch costs one forward and one backward pass. Batches that hold
    more than tokens (images) and models that cannot be taken apart so are asked each time.

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
        max_cached_tokens: the greatest number of answer tokens whose hidden states are kept; 0: none, the base runs
            for every batch. A token takes hidden size times bytes of the dtype: 8 kB in a model of 7 billion
            parameters in bfloat16, so the default takes up to 0.8 GB there. Samples for which there is no room are
            asked each time.

    Raises:
        ActTypeError: no iterable of batches; a weight or a number that is none.
        ActValueError: a weight that is not finite or not above 0, fewer than one batch per step, a negative number of
            tokens. At the start of the training: a model without adapters to switch off, prompt learning, trained
            biases of the base, float16 with a scaled loss, DeepSpeed, FSDP. During the training: no batch, a batch
            without an answer token, a model without logits, a divergence that is not finite.

    Example:
        >>> model = get_peft_model(base, ActConfig(channels=mask, donor=DONOR, task_type="CAUSAL_LM"))
        >>> arguments = TrainingArguments("training", max_steps=2, report_to="none", use_cpu=True)
        >>> keep = KeepCallback(batches, weight=0.5)
        >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[keep])
        >>> trainer.train()
    """

    argument = "keep_dataloader"
    figure = "keep_divergence"
    teacher_name = "base"

    def __init__(
        self,
        keep_dataloader: Iterable[Mapping[str, Any]],
        weight: float = 1.0,
        batches_per_step: int = 1,
        max_cached_tokens: int = 100_000,
    ) -> None:
        super().__init__(keep_dataloader, weight, batches_per_step, max_cached_tokens)

    def _open_teacher(self, model: nn.Module, student: AnswerLogits) -> Teacher:
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

        @contextmanager
        def asking() -> Iterator[None]:
            with evaluation(model), same_gradients(model), model.disable_adapter():
                yield

        return Teacher(student, asking, without_adapters=True, max_cached_tokens=self.max_cached_tokens)
