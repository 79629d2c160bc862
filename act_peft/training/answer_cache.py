"""What a teacher answered to a sample, found again in whatever batch the sample comes."""

from __future__ import annotations

import hashlib

import torch

from act_peft.batches.predictions import Predictions

_ONLY_FOR_THE_LOSS = frozenset({"labels", "num_items_in_batch"})


class AnswerCache:
    """The last hidden states of the answer tokens, a sample an entry, on the CPU in the model's dtype.

    Once it is full nothing more is added, and nothing is dropped: the samples come round and round, so what is there
    is used in every round.

    Args:
        max_tokens: the greatest number of answer tokens.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._hidden: dict[bytes, torch.Tensor] = {}
        self.num_tokens = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._hidden

    def __getitem__(self, key: bytes) -> torch.Tensor:
        return self._hidden[key]

    def add(self, key: bytes, hidden: torch.Tensor) -> None:
        """Keep the hidden states `[n, H]` of one sample, if there is room."""
        if key not in self._hidden and self.num_tokens + len(hidden) <= self._max_tokens:
            self._hidden[key] = hidden.clone()  # a part of a batch must not hold the whole batch
            self.num_tokens += len(hidden)


def sample_keys(batch: Predictions) -> list[bytes] | None:
    """A key for each sample: equal for equal tokens at equal positions with the same answers, whatever the padding.

    Returns:
        B keys, or None if the batch holds more than one number for each token (images, embeddings, a mask for each
        query), or has a decoder of its own.
    """
    inputs = {n: v for n, v in batch.inputs.items() if n not in _ONLY_FOR_THE_LOSS and v is not None}
    if batch.encoder_decoder or "input_ids" not in inputs:
        return None
    if any(not isinstance(value, torch.Tensor) or value.shape != batch.shape for value in inputs.values()):
        return None
    inputs = {name: value.cpu() for name, value in inputs.items()}
    mask = inputs.pop("attention_mask", None)
    kept = torch.ones(batch.shape, dtype=torch.bool) if mask is None else mask != 0
    answers = torch.zeros(batch.shape[0] * batch.shape[1], dtype=torch.bool)
    answers[batch.positions] = True
    inputs["answers"] = answers.view(batch.shape)
    # Without positions in the batch a model counts them from the start of the row, padding included.
    inputs.setdefault("position_ids", torch.arange(batch.shape[1]).expand(batch.shape))
    keys = []
    for row, seen in enumerate(kept):
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(f"{name} {inputs[name].dtype}\n".encode())
            digest.update(inputs[name][row][seen].contiguous().view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys
