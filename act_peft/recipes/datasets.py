"""The examples of a recipe: which of them are fitted and trained on, and which are only measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset
from torch import nn

from act_peft.data.loading import draw, load_examples
from act_peft.data.tokenizing import TokenizedRows, joined, tokenize
from act_peft.errors import ActValueError
from act_peft.recipes.schema import Examples, Recipe


class Skills:
    """The examples of every skill, loaded once and tokenized once.

    Args:
        recipe: the recipe.
        load_base: loads the base, which tokenizes.
        tokenizer: the base's.
        report: called with a sentence on what is counted or left out.

    Attributes:
        train: name -> examples to fit and train on.
        test: name -> examples to measure on.

    Raises:
        ActValueError: as `load_examples`; too few examples to hold some out.
    """

    def __init__(
        self, recipe: Recipe, load_base: Callable[[], nn.Module], tokenizer: Any, report: Callable[[str], None]
    ) -> None:
        self.recipe, self.tokenizer, self._report, self._load_base = recipe, tokenizer, report, load_base
        self._base: nn.Module | None = None
        self._tokenized: dict[tuple[str, str], TokenizedRows] = {}
        self.train: dict[str, Dataset] = {}
        self.test: dict[str, Dataset] = {}
        for name, examples in {**recipe.abilities, **recipe.keep, **recipe.untouched}.items():
            self._load(name, examples)

    def training_rows(self, names: Iterable[str]) -> TokenizedRows:
        """The rows of some skills to fit and train on."""
        found = [self._rows("train", name) for name in names]
        return found[0] if len(found) == 1 else joined(found)

    def test_rows(self, name: str) -> TokenizedRows:
        """The rows of a skill to measure on."""
        return self._rows("test", name)

    @property
    def base(self) -> nn.Module:
        """A base, only to ask it for what it is."""
        self._base = self._load_base() if self._base is None else self._base
        return self._base

    def _load(self, name: str, examples: Examples) -> None:
        reading, seed = self.recipe.reading, self.recipe.seed
        trained = test = None
        if examples.train is not None:
            trained = load_examples(examples.train, split=reading.split, seed=seed)
        if examples.test is not None:
            test = load_examples(examples.test, split=reading.split, seed=seed)
        if trained is not None and test is None:
            held_out = round(len(trained) * reading.held_out)
            if not 0 < held_out < len(trained):
                raise ActValueError(
                    f"{name}: got {len(trained)} examples, expected enough to hold out {reading.held_out:g} of them "
                    "(name others in `test`)"
                )
            shuffled = trained.shuffle(seed=seed)
            test, trained = shuffled.select(range(held_out)), shuffled.select(range(held_out, len(shuffled)))
        if trained is not None:
            self.train[name] = draw(trained, reading.samples, seed)
        if test is not None:
            self.test[name] = draw(test, reading.test_samples, seed)

    def _rows(self, part: str, name: str) -> TokenizedRows:
        if (part, name) not in self._tokenized:
            reading, examples = self.recipe.reading, (self.train if part == "train" else self.test)[name]
            rows = tokenize(
                examples,
                self.base,
                self.tokenizer,
                max_length=reading.max_length,
                counted=reading.counted,
                name=f"{name} ({part})",
            )
            for note in rows.notes:
                self._report(note)
            self._tokenized[part, name] = rows if part == "train" else rows.without_end(self.tokenizer.eos_token_id)
        return self._tokenized[part, name]
