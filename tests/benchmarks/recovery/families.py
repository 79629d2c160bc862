"""One tiny family in memory: its models, the few examples that every method may see, and how well a model does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft.channels.scores import ChannelScores
from act_peft.demo.family import encode
from act_peft.demo.task import Row, Split, accuracy, rows
from act_peft.demo.words import Language
from act_peft.fitting import FittedTransfer, fit
from act_peft.localization import localize
from tests.support.family_training import train_family

ABILITY, KEPT, UNTOUCHED = Language.SPANISH, Language.GERMAN, Language.ENGLISH

Encoded = tuple[
    torch.Tensor, ...
]  # token ids and labels, int64 [N, T] each; maybe probabilities of the next tokens [N, T, V]
Accuracies = dict[str, float]  # language -> share of the problems that is answered right


@dataclass(frozen=True)
class Family:
    """A base, its donor, and examples of two skills.

    Attributes:
        folder: holds `base` and `donor`.
        examples: training problems of the ability, and as many of the skill to keep.
        validation: validation problems of each, which settings are chosen on.
        test: test problems of each language, which are reported.
    """

    folder: Path
    examples: int
    validation: int
    test: int

    @classmethod
    def of_seed(cls, seed: int, folders: Path, *, examples: int, validation: int, test: int) -> Family:
        """The family in `folders/family_seed<N>`, trained now if it is not there."""
        folder = folders / f"family_seed{seed}"
        if not folder.exists():
            train_family(folder, seed=seed)
        return cls(folder, examples=examples, validation=validation, test=test)

    @property
    def donor_folder(self) -> str:
        """For `ActConfig(donor=...)`."""
        return str(self.folder / "donor")

    def base(self) -> Any:
        """A fresh copy of the base."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "base")

    def donor(self) -> Any:
        """A fresh copy of the donor."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "donor")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of both."""
        return AutoTokenizer.from_pretrained(self.folder / "base")

    @cached_property
    def training(self) -> Mapping[Language, Encoded]:
        """The examples that every trained method sees, encoded to one width."""
        both = [row for skill in (ABILITY, KEPT) for row in rows(skill, Split.TRAIN, count=self.examples)]
        ids, labels = encode(self.tokenizer, both)  # [2 N, T]
        half = self.examples
        return {ABILITY: (ids[:half], labels[:half]), KEPT: (ids[half:], labels[half:])}

    @cached_property
    def anchored(self) -> Mapping[Language, Encoded]:
        """The same with probabilities of what is to be learned: of the labels, and for what is kept the base's."""
        (ids, labels), kept = self.training[ABILITY], self.training[KEPT]
        with torch.no_grad():
            answers = self.base().eval()(input_ids=kept[0]).logits.softmax(-1)  # [N, T, V], of the next token each
        following = labels.roll(-1, dims=1).clamp(min=0)
        exact = torch.nn.functional.one_hot(following, answers.shape[-1]).to(answers.dtype)
        return {ABILITY: (ids, labels, exact), KEPT: (*kept, answers)}

    @cached_property
    def activation_scores(self) -> ChannelScores:
        """The paper's scores, on the examples of the ability; without the token embedding, which never helped.

        The output layer is a candidate here: the README's table was made so.
        """
        return localize(
            self.base(),
            self.donor(),
            self._batches(ABILITY),
            target_modules=".*",
            exclude_modules=["embed_tokens"],
            show_progress=False,
        )

    def fitted(self, keep_weight: float) -> FittedTransfer:
        """The donor's difference, fitted on the examples of both skills."""
        ability, kept = (self._batches(skill) for skill in (ABILITY, KEPT))
        return fit(self.base(), self.donor(), ability, kept, keep_weight=keep_weight, max_rank=0, show_progress=False)

    def validate(self, model: Any) -> Accuracies:
        """Accuracy in the two skills that settings may be chosen by."""
        return self._accuracies(model, (ABILITY, KEPT), Split.VALIDATION, self.validation)

    def measure(self, model: Any) -> Accuracies:
        """Accuracy in all three languages, for the report."""
        return self._accuracies(model, (ABILITY, KEPT, UNTOUCHED), Split.TEST, self.test)

    def _accuracies(self, model: Any, languages: tuple[Language, ...], split: Split, count: int) -> Accuracies:
        problems: dict[str, list[Row]] = {language.value: rows(language, split, count=count) for language in languages}
        return {name: accuracy(model, self.tokenizer, chosen) for name, chosen in problems.items()}

    def _batches(self, skill: Language) -> list[dict[str, torch.Tensor]]:
        ids, labels = self.training[skill]
        mask = (ids != self.tokenizer.pad_token_id).long()
        names = ("input_ids", "labels", "attention_mask")
        parts = [tensor.split(100) for tensor in (ids, labels, mask)]
        return [dict(zip(names, batch, strict=True)) for batch in zip(*parts, strict=True)]
