"""Additions in number words: the problems, their fixed split, and exact-match accuracy.

A problem is a pair of numbers a, b >= 0 with a + b <= 99, 5,050 in all. The same pairs are held out in every language,
so nothing about a held-out sum can leak from one language into another.
"""

import random
from collections.abc import Sequence
from enum import Enum

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from act_peft.batches.evaluation import evaluation
from act_peft.demo.words import LARGEST_NUMBER, Language, number_words, operator_words
from act_peft.errors import ActValueError

# The longest answer has three words ("neun und fuenfzig"); one more step is for the end-of-sequence token.
MAX_ANSWER_TOKENS = 4

Row = dict[str, str]


class Split(str, Enum):
    """A part of the 5,050 problems."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


_SIZES = {Split.TRAIN: 4050, Split.VALIDATION: 500, Split.TEST: 500}


def _split_pairs() -> dict[Split, tuple[tuple[int, int], ...]]:
    pairs = [(a, b) for a in range(LARGEST_NUMBER + 1) for b in range(LARGEST_NUMBER + 1 - a)]
    random.Random(0).shuffle(pairs)
    parts, start = {}, 0
    for split, size in _SIZES.items():
        parts[split] = tuple(pairs[start : start + size])
        start += size
    return parts


_PAIRS = _split_pairs()


def pairs(split: Split) -> tuple[tuple[int, int], ...]:
    """The number pairs of a split, in a fixed random order: the first n are a fair sample."""
    return _PAIRS[split]


def row(a: int, b: int, language: Language) -> Row:
    """Write one problem in TRL's prompt-completion format.

    The completion starts with a space, so that prompt + completion is a sentence again, one token a word.

    Args:
        a: the first number.
        b: the second number; a + b is at most 99.
        language: the language of the sentence.

    Returns:
        `{"prompt": "zwei plus drei gleich", "completion": " fuenf"}`.
    """
    plus, equals = operator_words(language)
    prompt = f"{number_words(a, language)} {plus} {number_words(b, language)} {equals}"
    return {"prompt": prompt, "completion": f" {number_words(a + b, language)}"}


def rows(language: Language, split: Split, *, count: int | None = None) -> list[Row]:
    """The problems of a split in one language.

    Args:
        language: the language of the sentences.
        split: which problems.
        count: number of problems, from the start of the split; all by default.

    Returns:
        Prompt-completion rows; `datasets.Dataset.from_list` makes a training set of them.

    Raises:
        ActValueError: the split has fewer problems than `count`.
    """
    chosen = pairs(split)
    if count is not None:
        if not 0 <= count <= len(chosen):
            raise ActValueError(f"rows: got count={count}, expected 0 to {len(chosen)} (the {split.value} split)")
        chosen = chosen[:count]
    return [row(a, b, language) for a, b in chosen]


def accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, batch_size: int = 500
) -> float:
    """The share of problems whose whole answer is right under greedy decoding.

    Args:
        model: a causal language model with `generate`; afterwards it is in the same mode as before.
        tokenizer: the model's tokenizer. Prompts are tokenized with its special tokens, as TRL does for training.
        rows: Prompt-completion rows.
        batch_size: prompts in one call of `generate`.

    Returns:
        A number from 0 to 1.

    Raises:
        ActValueError: there are no rows.
    """
    if not rows:
        raise ActValueError("accuracy: got no rows, expected at least one")
    device = next(model.parameters()).device
    correct = 0
    with evaluation(model), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = tokenizer([r["prompt"] for r in batch], padding=True, padding_side="left", return_tensors="pt")
            generated = model.generate(  # type: ignore[operator]
                input_ids=prompts["input_ids"].to(device),
                attention_mask=prompts["attention_mask"].to(device),
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # [B, T + up to MAX_ANSWER_TOKENS]
            answers = generated[:, prompts["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            correct += sum(text.strip() == r["completion"].strip() for text, r in zip(texts, batch, strict=True))
    return correct / len(rows)
