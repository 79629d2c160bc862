"""Tiny models and examples that come with the package, to try something on."""

from __future__ import annotations

from datasets import Dataset

from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from act_peft.errors import ActValueError

__all__ = ["BASE", "DONOR", "examples"]


def examples(language: str, *, count: int = 100, test: bool = False) -> Dataset:
    """Sums in number words, as prompts and completions.

    Args:
        language: `spanish` or `english`, which the base forgot and the donor knows; or `german`, which the base knows.
        count: number of examples, at most 4,050, or 500 for tests.
        test: other examples than those to train on.

    Raises:
        ActValueError: another language or number.

    Example:
        >>> examples("german")[0]
        {'prompt': 'eins plus neun und vierzig gleich', 'completion': ' fuenfzig'}
    """
    names = {member.name.lower(): member for member in Language}
    if language not in names:
        raise ActValueError(f"language: got {language!r}, expected one of {', '.join(names)}")
    return Dataset.from_list(rows(names[language], Split.TEST if test else Split.TRAIN, count=count))
