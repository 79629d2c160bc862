"""The logits of a model at the answer tokens of a batch, without those of all other tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import forward
from act_peft.batches.predictions import Predictions, logits_of
from act_peft.layers.lookup import output_head
from act_peft.peft_modules import without_wrapper

# Matrix products of other sizes round in another order: a few units in the last place of the greatest logit.
_UNITS = 4
_SINGLE_PRECISION = 1e-4


class AnswerLogits:
    """Asks a model for its logits at the answer tokens.

    The output layer gets the hidden states of these tokens only, so what the model does after it (soft-capping, a
    scale) still happens. At the first batch both ways are compared. If they differ, or the model calls its output
    layer in another way, all logits are computed and those of the answer tokens are taken.

    Attributes:
        model: the language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._is_narrow: bool | None = None  # not known yet

    def __call__(self, batch: Predictions) -> torch.Tensor:
        """Run the model.

        Returns:
            Logits `[N, V]`.

        Raises:
            ActValueError: the model returns no logits of one token each.
        """
        if self._is_narrow is None:
            with evaluation(self.model):
                narrow = self._narrow(batch)
                self._is_narrow = narrow is not None and same_logits(narrow, self._full(batch))
        logits = self._narrow(batch) if self._is_narrow else None
        return self._full(batch) if logits is None else logits

    def _full(self, batch: Predictions) -> torch.Tensor:
        logits = logits_of(self.model, batch)  # [B * T, V]
        return logits.index_select(0, batch.positions.to(logits.device))

    def _narrow(self, batch: Predictions) -> torch.Tensor | None:
        head = output_head(without_wrapper(self.model))
        if head is None:
            return None
        with only_at(head, batch.positions, batch.shape):
            logits = getattr(forward(self.model, batch.inputs), "logits", None)
        expected = (1, len(batch.positions))
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or tuple(logits.shape[:2]) != expected:
            return None
        return logits[0]


@contextmanager
def only_at(head: nn.Module, positions: torch.Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Inside the context the output layer gets `[1, N, H]` in place of `[B, T, H]`: the hidden states of some tokens.

    Args:
        head: the output layer. An input of another shape stays as it is.
        positions: of the tokens in the flattened batch, int64 `[N]`.
        shape: `(B, T)`.
    """

    def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not args or args[0].dim() != 3 or tuple(args[0].shape[:2]) != shape:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, positions.to(args[0].device))  # [N, H]
        return (hidden[None], *args[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()


def same_logits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to compute logits `[N, V]` give the same, apart from rounding; NaN and infinite ones alike."""
    if found.shape != expected.shape:
        return False
    tolerance = max(_UNITS * torch.finfo(expected.dtype).eps, _SINGLE_PRECISION)
    finite = expected[torch.isfinite(expected)]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    close = torch.isclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    return bool(close.all())
