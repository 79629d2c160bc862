"""A model that answers the same batches again and again, and is run once a sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from act_peft.batches.predictions import Predictions
from act_peft.errors import ActValueError
from act_peft.training.answer_cache import AnswerCache, sample_keys
from act_peft.training.answer_logits import AnswerLogits
from act_peft.training.head_only import HeadOnly, find_head_only


class Teacher:
    """Gives the logits of a fixed model at the answer tokens.

    The last hidden states of a sample's answer tokens are kept, and later only what follows the backbone is run on
    them: the output layer. A model that cannot be taken apart so is run for every batch, and so are samples for which
    there is no room and batches that hold more than tokens.

    Args:
        logits: the model.
        asking: a context in which the model is the teacher: no gradients, evaluation mode, its adapters off perhaps.
        without_adapters: whether the context switches the model's adapters off.
        max_cached_tokens: the greatest number of answer tokens to keep; 0: none.
    """

    def __init__(
        self,
        logits: AnswerLogits,
        asking: Callable[[], AbstractContextManager[None]],
        *,
        without_adapters: bool,
        max_cached_tokens: int,
    ) -> None:
        self._asked: tuple[AnswerLogits, Callable[[], AbstractContextManager[None]]] | None = (logits, asking)
        self._without_adapters = without_adapters
        self._cache = AnswerCache(max_cached_tokens)
        self._head: HeadOnly | None = None
        self._is_whole = max_cached_tokens == 0  # asked as a whole for every batch

    def logits(self, batch: Predictions) -> torch.Tensor:
        """Logits `[N, V]`, without gradient.

        Raises:
            ActValueError: the model returns no logits; it was released and has not answered a sample.
        """
        keys = None if self._is_whole else sample_keys(batch)
        head = None if keys is None else self._find_head(batch)
        if keys is None or head is None:
            model, asking = self._model_to_ask()
            with asking():
                return model(batch)
        return head(self._hidden(batch, keys, head))

    def learn(self, batch: Predictions) -> bool:
        """Ask the model and keep the answers.

        Returns:
            Whether all of them are kept.
        """
        self.logits(batch)
        keys = sample_keys(batch)
        rows = set((batch.positions // batch.shape[1]).tolist())  # those with answers
        return keys is not None and all(keys[row] in self._cache for row in rows)

    def release(self) -> None:
        """Hold nothing of the model but what follows the backbone."""
        self._asked = None

    def _model_to_ask(self) -> tuple[AnswerLogits, Callable[[], AbstractContextManager[None]]]:
        if self._asked is None:
            raise ActValueError(
                "got a sample that the donor did not answer before it was released, expected the same samples in "
                "every round over the data (release_donor=False keeps the donor)"
            )
        return self._asked

    def _find_head(self, batch: Predictions) -> HeadOnly | None:
        """What follows the backbone; found out at the first batch."""
        if self._head is None:
            logits, asking = self._model_to_ask()
            with asking():
                found = find_head_only(logits.model, batch, plain=self._without_adapters)
            # Asked outside the context: PEFT lets the originals of saved modules train while adapters are off.
            if found is not None and self._without_adapters and not found.is_fixed:
                found = None
            self._head, self._is_whole = found, found is None
        return self._head

    def _hidden(self, batch: Predictions, keys: list[bytes], head: HeadOnly) -> torch.Tensor:
        """Last hidden states `[N, H]`, of new samples from the model and of all others from the cache."""
        rows, counts = (batch.positions // batch.shape[1]).unique_consecutive(return_counts=True)
        sizes = dict(zip(rows.tolist(), counts.tolist(), strict=True))
        hidden = {row: self._cache[keys[row]] for row in sizes if keys[row] in self._cache}
        missing = [row for row in sizes if row not in hidden]
        if missing:
            logits, asking = self._model_to_ask()
            with asking():
                found = head.ask(logits.model, batch.of_rows(torch.tensor(missing))).cpu()
            for row, part in zip(missing, found.split([sizes[row] for row in missing]), strict=True):
                hidden[row] = part
                self._cache.add(keys[row], part)
        return torch.cat([hidden[row] for row in sizes])
