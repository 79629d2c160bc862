"""The outputs of a language model that predict the answer tokens of a batch, and their logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from act_peft.batches.answer_tokens import IGNORED_LABEL, find_answer_tokens
from act_peft.batches.forward import forward
from act_peft.errors import ActValueError


@dataclass(frozen=True)
class Predictions:
    """The N answer tokens of a batch that have a token before them, and the positions of their predictions.

    Attributes:
        inputs: the batch.
        shape: `(B, T)` of the outputs.
        positions: positions of the predictions in the flattened outputs, int64 `[N]`.
        targets: the tokens, int64 `[N]`.
        encoder_decoder: whether the model has an encoder and a decoder. Its loss compares each label with the output
            at the same position, without a shift.
    """

    inputs: Mapping[str, Any]
    shape: tuple[int, int]
    positions: torch.Tensor
    targets: torch.Tensor
    encoder_decoder: bool

    def labels(self) -> torch.Tensor:
        """Labels `[B, T]` for the model's own loss, which then counts exactly these tokens."""
        labels = torch.full((self.shape[0] * self.shape[1],), IGNORED_LABEL)
        labels[self.positions if self.encoder_decoder else self.positions + 1] = self.targets
        return labels.view(self.shape)

    def of_rows(self, rows: torch.Tensor) -> Predictions:
        """Those of some samples, for batches of `[B, T]` tensors alone.

        Args:
            rows: numbers of the samples, int64, ascending.
        """
        inputs = {n: v.index_select(0, rows.to(v.device)) if _is_tensor(v) else v for n, v in self.inputs.items()}
        length = self.shape[1]
        number = torch.full((self.shape[0],), -1).index_copy(0, rows, torch.arange(len(rows)))
        new = number[self.positions // length]
        kept = new >= 0
        return replace(
            self,
            inputs=inputs,
            shape=(len(rows), length),
            positions=(new * length + self.positions % length)[kept],
            targets=self.targets[kept],
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def find_predictions(batch: Mapping[str, Any]) -> Predictions:
    """Find the predictions in a batch: one position before the token, as in the loss of causal language models.

    In batches with `decoder_input_ids` the prediction is at the position of the label.

    Raises:
        ActTypeError, ActValueError: as `find_answer_tokens`; also if no answer token has a token before it.
    """
    tokens = find_answer_tokens(batch)
    encoder_decoder = batch.get("decoder_input_ids") is not None
    prefix = "decoder_" if encoder_decoder else ""
    labels, ids = batch.get("labels"), batch.get(f"{prefix}input_ids")
    answers = ids if labels is None else labels
    if answers is None:
        raise ActValueError("got inputs_embeds without labels, expected labels (they hold the right tokens)")
    index, shape = tokens.index, (tokens.batch_size, tokens.length)
    targets = answers.cpu().flatten()[index]
    if not (encoder_decoder and labels is not None):
        mask = batch.get(f"{prefix}attention_mask")
        seen = torch.ones(shape, dtype=torch.bool)
        if mask is not None and mask.shape == shape:
            seen &= mask.cpu() != 0
        follows = index % tokens.length > 0
        follows &= seen.flatten()[(index - 1).clamp(min=0)]
        index, targets = index[follows] - 1, targets[follows]
    if not index.numel():
        raise ActValueError(
            "got answer tokens at the first position of samples only, expected at least one with a token before it"
        )
    return Predictions(batch, shape, index, targets, encoder_decoder)


def logits_of(model: nn.Module, batch: Predictions) -> torch.Tensor:
    """Run a model on a batch.

    Returns:
        Logits `[B * T, V]`; those at `batch.positions` predict the answer tokens.

    Raises:
        ActValueError: the model returns no logits of this shape.
    """
    logits = getattr(forward(model, batch.inputs), "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or tuple(logits.shape[:2]) != batch.shape:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else "none"
        raise ActValueError(
            f"{type(model).__name__}: got logits {got}, expected [{batch.shape[0]}, {batch.shape[1]}, V] (take a "
            "language model, such as AutoModelForCausalLM)"
        )
    return logits.flatten(0, 1)
