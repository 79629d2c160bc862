"""The two models of the demo: a donor that knows Spanish and English, and a base that forgot them for German.

Both are ordinary checkpoint folders of a Llama with 230,000 parameters and a word-level tokenizer. They are trained by
`tests/support/family_training.py`, which belongs to the repository and not to the installed package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from act_peft.batches.answer_tokens import IGNORED_LABEL
from act_peft.demo.task import Row

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
BASE = _CHECKPOINTS / "base"
DONOR = _CHECKPOINTS / "donor"


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize rows as TRL does: the labels are the answer and the end-of-sequence token.

    Args:
        tokenizer: the tokenizer of the two models.
        examples: prompt-completion rows.

    Returns:
        Token ids and labels, both int64 `[B, T]`, padded on the right; the label of prompt and padding is -100.
    """
    prompts = tokenizer([example["prompt"] for example in examples])["input_ids"]
    texts = [example["prompt"] + example["completion"] + str(tokenizer.eos_token) for example in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, labels = batch["input_ids"], batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = IGNORED_LABEL
    for index, prompt in enumerate(prompts):
        labels[index, : len(prompt)] = IGNORED_LABEL
    return ids, labels
