"""Bring an ability over during a training: on data of this ability the donor is the teacher."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from act_peft.batches.evaluation import evaluation
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.localization.pair import Donor, beside
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.training.answer_logits import AnswerLogits
from act_peft.training.teacher import Teacher
from act_peft.training.teaching import TeachingCallback


class DonorCallback(TeachingCallback):
    """Let the donor teach its ability while the model trains, in any Trainer: the mirror of `KeepCallback`.

    Before each optimizer step the model runs on a batch of the ability's data. The gradient of

        weight * mean over the answer tokens of KL(donor's next token || model's next token)

    is added to the gradient of the Trainer's loss before gradients are clipped (knowledge distillation, arXiv
    1503.02531). It works for language models with any PEFT method and for a full fine-tune, alone or beside
    `KeepCallback`. The labels only decide which tokens count. The answers may be the donor's own (generate them first)
    or anybody's.

    The donor runs once for each sample, as the base does for `KeepCallback`: its last hidden states at the answer
    tokens are kept in CPU memory, and in later rounds only its output layer runs on them. With `release_donor` it
    answers all samples before the first step, and nothing of it stays but its output layer.

    A donor with another number of tokens is compared on the first ones, common to both models: both distributions are
    then those over the common tokens.

    Every log of the Trainer gets `donor_divergence`: the mean divergence since the last log, in nats per token.
    Callbacks that the Trainer calls before this one (those of `report_to`) find it in `state.log_history`.

    Args:
        donor: a language model with the same tokenizer, on its own device; or the folder or Hub id of a PEFT adapter
            of the model's base (one model in memory: it shares the base's weights).
        ability_dataloader: batches (dicts) that both models accept, as for `localize`. At its end it starts again.
            With DistributedDataParallel every process needs its own part, as the Trainer's `get_train_dataloader()`
            gives.
        weight: factor of this loss, relative to the Trainer's loss; above 0.
        batches_per_step: number of batches per step, run one after the other; the divergences are averaged.
        max_cached_tokens: the greatest number of answer tokens whose hidden states are kept; 0: none, the donor runs
            for every batch. A token takes the donor's hidden size times bytes of its dtype.
        release_donor: let go of the donor before the first step. Its memory is free if nobody else holds it
            (`DonorCallback(AutoModelForCausalLM.from_pretrained(...), ...)`). Every round over the data has to
            bring the same samples then, and all of them have to fit into `max_cached_tokens`.

    Raises:
        ActTypeError: no model, folder or Hub id; no iterable of batches; a weight or a number that is none.
        ActValueError: a weight that is not finite or not above 0, fewer than one batch per step, a negative number of
            tokens. At the start of the training: an adapter that cannot be loaded; a donor whose weights are trained;
            answers that cannot all be kept, with `release_donor`; float16 with a scaled loss, DeepSpeed, FSDP. During
            the training: no batch, a batch without an answer token or with tokens that only one of the models knows,
            a model without logits, a divergence that is not finite.

    Warns:
        ActWarning: the models have different numbers of tokens.

    Example:
        >>> model = get_peft_model(base, ActConfig(channels=mask, task_type="CAUSAL_LM"))
        >>> arguments = TrainingArguments("training", max_steps=2, report_to="none", use_cpu=True)
        >>> teacher = DonorCallback(donor, batches, weight=0.5)
        >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[teacher])
        >>> trainer.train()
    """

    argument = "ability_dataloader"
    figure = "donor_divergence"
    teacher_name = "donor"

    def __init__(
        self,
        donor: Donor,
        ability_dataloader: Iterable[Mapping[str, Any]],
        weight: float = 1.0,
        batches_per_step: int = 1,
        max_cached_tokens: int = 100_000,
        *,
        release_donor: bool = False,
    ) -> None:
        super().__init__(ability_dataloader, weight, batches_per_step, max_cached_tokens)
        if not isinstance(donor, (nn.Module, str, os.PathLike)):
            raise ActTypeError(
                f"donor: got {type(donor).__name__}, expected a torch.nn.Module, or the folder or Hub id of an adapter"
            )
        self.release_donor = release_donor
        self._donor: Donor | None = donor
        self._vocabulary: CommonVocabulary

    def _open_teacher(self, model: nn.Module, student: AnswerLogits) -> Teacher:
        if self._donor is None:  # released in an earlier training: its answers are here
            return self._teacher
        donor = self._donor if isinstance(self._donor, nn.Module) else beside(model, self._donor)
        trained = {p.data_ptr() for p in model.parameters() if p.requires_grad and p.numel()} - {0}
        if any(parameter.data_ptr() in trained for parameter in donor.parameters()):
            raise ActValueError(
                "DonorCallback: got a donor that has weights in common with what is trained, expected one that stays "
                "as it is (load it on a second copy of the base and pass that model)"
            )
        self._vocabulary = CommonVocabulary(model, donor)
        if self._vocabulary.left_out is not None:
            warnings.warn(f"DonorCallback: {self._vocabulary.left_out}", ActWarning, stacklevel=2)
        teacher = Teacher(
            AnswerLogits(donor),
            lambda: evaluation(donor),
            without_adapters=False,
            max_cached_tokens=self.max_cached_tokens,
        )
        if self.release_donor:
            self._learn(teacher)
            teacher.release()
            self._donor = None
        return teacher

    def _learn(self, teacher: Teacher) -> None:
        """Let the donor answer everything."""
        for number, batch in enumerate(self._dataloader):
            if not teacher.learn(self._find(batch, number)):
                raise ActValueError(
                    f"release_donor: the answers of batch {number} cannot be kept, expected batches of tokens alone, "
                    f"at most {self.max_cached_tokens} answer tokens in all (max_cached_tokens), and a model whose "
                    "output layer can be run alone (release_donor=False asks the donor during the training)"
                )

    def _check(self, batch: Mapping[str, Any]) -> None:
        self._vocabulary.check(batch)
