"""One pair of relatives with the examples of one seed: what a method gets, and how its model is measured."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import data
import models
import torch
from measure import Row, Scored, batches, log_probabilities, score
from transformers import AutoTokenizer

ABILITY, OTHER, OPEN, GERMAN, CODE = "geography", "other", "open", "german", "code"


@dataclass(frozen=True)
class Pair:
    """Two relatives and what is asked of them.

    Attributes:
        base: Folder of the model that forgot.
        donor: Folder of the one that did not.
        kept: The skill that the base was specialised in.
        untouched: Skills that are in nobody's data.
    """

    base: str
    donor: str
    kept: str
    untouched: tuple[str, ...]


PAIRS = {
    "german": Pair("german", models.DONOR, GERMAN, (OTHER, OPEN, CODE)),
    "code": Pair("code", models.DONOR, CODE, (OTHER, OPEN, GERMAN)),
    "sibling": Pair("german", "code", GERMAN, (OTHER, OPEN, CODE)),
}
TEXTS = (GERMAN, CODE)
VALIDATED, KEPT_TESTED, TEXTS_TESTED, ANSWERS_TESTED = 24, 48, 24, 16  # pieces of text, open answers
ANSWERED_WHOLE = (ABILITY, OTHER)  # an answer is right or wrong as a whole; of all others every token is counted


@dataclass(frozen=True)
class Sizes:
    """How many examples there are.

    Attributes:
        ability: To learn from.
        kept: Pieces of text to hold on to.
        measured: At most, of every skill when it is measured; None: all.
    """

    ability: int = 100
    kept: int = 100
    measured: int | None = None


class Study:
    """A pair, the examples that one seed draws, and the sets that everything is measured on.

    Args:
        folder: Holds the models' folders and `data`.
        pair: Name in `PAIRS`.
        seed: Draws the examples to learn from and whatever a method draws itself.
        sizes: How many.
    """

    def __init__(self, folder: Path, pair: str, seed: int, sizes: Sizes = Sizes()) -> None:
        self.folder, self.name, self.pair, self.seed, self.sizes = folder, pair, PAIRS[pair], seed, sizes
        self.tokenizer = AutoTokenizer.from_pretrained(folder / models.DONOR)
        self.pad = self.tokenizer.pad_token_id

    # ------------------------------------------------------------------------------------------------- models ---

    @cached_property
    def reference(self) -> Any:
        """The base, which nobody may change."""
        return models.load(self.folder / self.pair.base).requires_grad_(False)

    @cached_property
    def teacher(self) -> Any:
        """The base for passes alone."""
        return models.halved(copy.deepcopy(self.reference))

    @cached_property
    def teaching_donor(self) -> Any:
        """The donor for passes alone."""
        return models.halved(copy.deepcopy(self.donor))

    @cached_property
    def donor(self) -> Any:
        """The donor, which nobody may change."""
        return models.load(self.folder / self.pair.donor).requires_grad_(False)

    @property
    def donor_folder(self) -> str:
        """For `ActConfig(donor=...)`."""
        return str(self.folder / self.pair.donor)

    def base(self) -> Any:
        """A fresh copy of the base."""
        return copy.deepcopy(self.reference).requires_grad_(True)

    def frozen_base(self) -> Any:
        """A fresh copy for adapters, which train while it does not."""
        return models.halved(copy.deepcopy(self.reference))

    # ----------------------------------------------------------------------------------------------- examples ---

    def rows(self, skill: str, split: str, count: int | None = None, *, shuffled: bool = False) -> list[Row]:
        """Examples of a skill as tokens, the first ones or those that the seed draws."""
        examples = data.read(self.folder / "data", skill, split)
        if shuffled:
            random.Random(f"{self.seed} {skill}").shuffle(examples)
        return [data.encode(example, self.tokenizer) for example in examples[:count]]

    def ability(self, count: int | None = None) -> list[Row]:
        """Examples of the ability to learn from."""
        return self.rows(ABILITY, "train", count or self.sizes.ability, shuffled=True)

    def kept(self) -> list[Row]:
        """Texts to hold on to."""
        return self.rows(self.pair.kept, "train", self.sizes.kept, shuffled=True)

    def general(self) -> list[Row]:
        """A dozen everyday requests with the donor's answers, neither of the ability nor measured."""
        return self.rows(OPEN, "train")

    def batches(self, rows: Sequence[Row], *, all_tokens: bool = False) -> list[dict[str, torch.Tensor]]:
        """For `localize` and `fit`: where there are no labels, every token counts that is no padding."""
        found = list(batches(rows, self.pad))
        if all_tokens:
            found = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in found]
        return found

    def draws(self, rows: Sequence[Row], size: int, salt: str = "") -> Iterator[list[Row]]:
        """Endless batches; every row comes once before one comes again."""
        generator, waiting = random.Random(f"{self.seed} {salt}"), []
        while True:
            while len(waiting) < size:
                waiting += generator.sample(list(rows), len(rows))
            yield waiting[:size]
            waiting = waiting[size:]

    # ---------------------------------------------------------------------------------------------- measuring ---

    def validate(self, model: Any) -> Mapping[str, float]:
        """What settings are chosen by: ability and kept skill on items that are nowhere else."""
        ability = score(model, self._measured(ABILITY, "validation", None), self.pad)
        kept = score(model, self._measured(self.pair.kept, "validation", VALIDATED), self.pad)
        return {"ability_accuracy": ability.accuracy, "ability_nll": ability.nll, "kept_nll": kept.nll}

    def test(self, model: Any) -> Mapping[str, Scored]:
        """Everything, by skill; of the kept one also the divergence from the base."""
        found = {ABILITY: score(model, self._measured(ABILITY, "test", None), self.pad)}
        rows = self._measured(self.pair.kept, "test", KEPT_TESTED)
        found[self.pair.kept] = score(model, rows, self.pad, expected=self._of_base)
        for skill in self.pair.untouched:
            most = TEXTS_TESTED if skill in TEXTS else ANSWERS_TESTED if skill == OPEN else None
            rows = self._measured(skill, "test", most)
            found[skill] = score(model, rows, self.pad)
        return found

    @cached_property
    def _of_base(self) -> list[torch.Tensor]:
        return log_probabilities(self.teacher, self._measured(self.pair.kept, "test", KEPT_TESTED), self.pad)

    def _measured(self, skill: str, split: str, most: int | None) -> list[Row]:
        limits = [limit for limit in (most, self.sizes.measured) if limit is not None]
        return self.rows(skill, split, min(limits, default=None))
