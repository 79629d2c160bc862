"""How well a model predicts rows: right answers, negative log-likelihood, divergence from another model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

IGNORED_LABEL = -100
BATCH_SIZE = 16


@dataclass(frozen=True)
class Row:
    """One example as token ids.

    Attributes:
        ids: Of prompt and completion.
        start: Where the completion, which alone counts, begins (at least 1).
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Scored:
    """What a model does on some rows.

    Attributes:
        right: By row, the answer tokens that are the model's first choice.
        tokens: By row, the answer tokens.
        losses: By row, the sum of -log p over them, in nats.
        choices: By row and token, whether it is the first choice.
        divergence: Mean KL(other || model) over all answer tokens in nats, if there was another model.
    """

    right: list[int]
    tokens: list[int]
    losses: list[float]
    choices: list[list[bool]]
    divergence: float | None

    @property
    def nll(self) -> float:
        """Mean over all answer tokens, in nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def accuracy(self) -> float:
        """Share of the rows of which every answer token is the first choice: what greedy decoding gets right."""
        return sum(map(int.__eq__, self.right, self.tokens)) / len(self.tokens)

    @property
    def token_accuracy(self) -> float:
        """Share of the answer tokens that are the first choice."""
        return sum(self.right) / sum(self.tokens)


def padded(rows: Sequence[Row], pad: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right, with labels only where an answer stands."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels, mask = torch.full_like(ids, IGNORED_LABEL), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.tensor(row.ids)
        labels[index, row.start : length] = ids[index, row.start : length]
        mask[index, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def batches(rows: Sequence[Row], pad: int, size: int = BATCH_SIZE) -> Iterator[dict[str, torch.Tensor]]:
    """All rows in their order."""
    for start in range(0, len(rows), size):
        yield padded(rows[start : start + size], pad)


def answer_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[N, V]` in float32 that predict the answer tokens `[N]`, and those; the head runs on no others."""
    wanted = batch["labels"][:, 1:]
    counted = wanted != IGNORED_LABEL
    inner, head = model.get_base_model() if hasattr(model, "get_base_model") else model, model.get_output_embeddings()
    hidden = inner.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return head(hidden.last_hidden_state[:, :-1][counted]).float(), wanted[counted]


@torch.no_grad()
def log_probabilities(model: Any, rows: Sequence[Row], pad: int) -> list[torch.Tensor]:
    """By row, the distribution over the next token at every answer token, float16 `[N, V]`."""
    model.eval()
    found: list[torch.Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(rows), BATCH_SIZE):
            chosen = rows[start : start + BATCH_SIZE]
            logits, _ = answer_logits(model, padded(chosen, pad))
            found += logits.log_softmax(-1).half().split([len(row.ids) - row.start for row in chosen])
    return found


@torch.no_grad()
def score(model: Any, rows: Sequence[Row], pad: int, expected: Sequence[torch.Tensor] | None = None) -> Scored:
    """Run a model over rows, in bfloat16 where autocast allows it.

    Args:
        model: A causal language model with a tied or an ordinary head, with or without PEFT's wrappers.
        rows: At least one.
        pad: Id that fills up a batch.
        expected: What `log_probabilities` found for another model, from which the divergence is measured.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))  # batches of about equal lengths
    right, losses = [0] * len(rows), [0.0] * len(rows)
    choices: list[list[bool]] = [[] for _ in rows]
    divergence, count = 0.0, 0
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(rows), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = padded([rows[index] for index in chosen], pad)
            logits, wanted = answer_logits(model, batch)
            found = logits.log_softmax(-1)  # [N, V]
            loss, hit = F.nll_loss(found, wanted, reduction="none"), found.argmax(-1) == wanted
            lengths = [len(rows[index].ids) - rows[index].start for index in chosen]
            for index, a, b in zip(chosen, loss.split(lengths), hit.split(lengths), strict=True):
                losses[index], right[index], choices[index] = float(a.sum()), int(b.sum()), b.tolist()
            if expected is not None:
                other = torch.cat([expected[index].float() for index in chosen])
                divergence += float(F.kl_div(found, other, reduction="sum", log_target=True))
                count += len(wanted)
    tokens = [len(row.ids) - row.start for row in rows]
    return Scored(right, tokens, losses, choices, divergence / count if count else None)
