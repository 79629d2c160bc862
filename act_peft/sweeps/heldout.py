"""Loss and token accuracy of a model on held-out data of one skill."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from act_peft.batches.predictions import Predictions, find_predictions, logits_of
from act_peft.batches.repeats import batches_of_all
from act_peft.errors import ActError, ActTypeError, ActValueError

# Number of logits converted to float32 at the same time: on the CPU they fit the cache, on other devices 512 MB.
_CPU_LOGITS, _LOGITS = 1 << 19, 1 << 27

TokenResults = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SampleSums:
    """Sums over the counted tokens of each of S samples (rows of the batches), float64 `[S]`.

    Attributes:
        losses: of the cross-entropies, in nats.
        hits: of the tokens that are more probable than every other one.
        tokens: number of the tokens, at least 1.
    """

    losses: torch.Tensor
    hits: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class SkillResult:
    """Loss and accuracy of a model on the data of one skill.

    Attributes:
        loss: mean cross-entropy of the answer tokens, in nats.
        accuracy: share of the answer tokens that are more probable than every other token, from 0 to 1. A tie is no
            hit, so a broken model with equal logits for all tokens has 0.
        samples: the same by samples, from which the standard errors follow; None where they are not known.
    """

    loss: float
    accuracy: float
    samples: SampleSums | None = field(default=None, compare=False, repr=False)

    @property
    def num_tokens(self) -> int | None:
        """Number of counted tokens."""
        return None if self.samples is None else int(self.samples.tokens.sum())

    @property
    def loss_error(self) -> float | None:
        """Standard error of the loss; tokens of one sample count as dependent. None if fewer than two samples."""
        return None if self.samples is None else _mean_error(self.samples.losses, self.samples.tokens)

    @property
    def accuracy_error(self) -> float | None:
        """The same of the accuracy."""
        return None if self.samples is None else _mean_error(self.samples.hits, self.samples.tokens)

    def rise_over(self, other: SkillResult) -> tuple[float, float | None]:
        """How much higher the loss is than that of another model on the same data, and the standard error of that.

        Both models saw the same samples, so the error is that of the differences, which is much smaller than that of
        either loss. None where it is not known.
        """
        rise = self.loss - other.loss
        if self.samples is None or other.samples is None:
            return rise, None
        return rise, _mean_error(self.samples.losses - other.samples.losses, self.samples.tokens)


class HeldOutData:
    """The batches of one skill. They are read once and stored, so that every model sees the same data.

    The counted tokens are the answer tokens with a token before them (as for the scores of arXiv 2601.09398):
    `labels != -100`, shifted as in causal language models; without labels, every unmasked token. In batches with
    `decoder_input_ids` the labels belong to the decoder and are not shifted.

    Args:
        dataloader: batches (dicts) that the models accept.
        argument: name of the argument with the batches, for messages.
        together: whether all processes of a distributed run make one now, each from its own part of the batches. All
            of them get all batches then.

    Attributes:
        batches: the batches, with their counted tokens.
        num_tokens: number of counted tokens N, over all batches.
        largest_token: the highest token id among inputs and answers.

    Raises:
        ActTypeError: not an iterable of dicts of tensors.
        ActValueError: no batch, or a batch without a counted token.
    """

    def __init__(self, dataloader: Iterable[Mapping[str, Any]], *, argument: str, together: bool = False) -> None:
        if not isinstance(dataloader, Iterable):
            raise ActTypeError(f"{argument}: got {type(dataloader).__name__}, expected an iterable of batches")
        self.batches: list[Predictions] = []
        for number, batch in enumerate(batches_of_all(dataloader, together=together)):
            try:
                self.batches.append(find_predictions(batch))
            except ActError as error:
                raise type(error)(f"{argument}: batch {number}: {error}") from error
        if not self.batches:
            raise ActValueError(
                f"{argument}: got no batch, expected at least one (is the dataset empty, or a generator exhausted?)"
            )
        self.num_tokens = sum(batch.targets.numel() for batch in self.batches)
        self.largest_token = max(_largest_token(batch) for batch in self.batches)
        self._samples = self._number_samples()  # of every token, int64 [N]

    def measure(self, model: nn.Module) -> SkillResult:
        """Run a model over all batches, in its current mode.

        Args:
            model: a language model that gives `logits` `[B, T, V]`.

        Returns:
            Loss and accuracy over the tokens of all batches, summed in float64.

        Raises:
            ActValueError: the model returns no such logits.
        """
        return self.result([token_results(model, batch) for batch in self.batches])

    def result(self, found: Sequence[TokenResults]) -> SkillResult:
        """The result over the tokens of all batches, from those of each batch in their order."""
        # The first wait for the device is here.
        loss, hit = (torch.cat(parts).to("cpu", torch.float64) for parts in zip(*found, strict=True))  # [N]
        samples = SampleSums(*(torch.bincount(self._samples, part) for part in (loss, hit, torch.ones_like(loss))))
        return SkillResult(float(loss.sum()) / self.num_tokens, int(hit.sum()) / self.num_tokens, samples)

    def _number_samples(self) -> torch.Tensor:
        """The number of the sample that each token lies in; samples without a token have no number."""
        found, start = [], 0
        for batch in self.batches:
            found.append(start + batch.positions // batch.shape[1])
            start += batch.shape[0]
        return torch.cat(found).unique(return_inverse=True)[1]


@torch.no_grad()
def token_results(model: nn.Module, batch: Predictions) -> TokenResults:
    """Run a model on a batch, in its current mode.

    Returns:
        Cross-entropy of each counted token, and whether it is more probable than every other one; `[N]` each, on the
        model's device.

    Raises:
        ActValueError: the model returns no logits `[B, T, V]`.
    """
    losses, hits = [], []
    logits = logits_of(model, batch)  # [B * T, V]
    positions, targets = batch.positions.to(logits.device), batch.targets.to(logits.device)
    at_once = max((_CPU_LOGITS if logits.device.type == "cpu" else _LOGITS) // logits.shape[1], 1)
    for where, answers in zip(positions.split(at_once), targets.split(at_once), strict=True):
        chosen = logits.index_select(0, where).float()  # [N, V]
        losses.append(F.cross_entropy(chosen, answers, reduction="none"))
        answer = chosen.gather(1, answers[:, None])  # [N, 1]
        rest = chosen.scatter_(1, answers[:, None], -torch.inf)  # `argmax` would double the time
        hits.append(answer[:, 0] > rest.amax(-1))
    return torch.cat(losses), torch.cat(hits)


def _mean_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Standard error of sum / count by samples, as of a ratio; None if it cannot be told."""
    number = len(sums)
    if number < 2:
        return None
    rest = sums - counts * (sums.sum() / counts.sum())  # [S]
    error = math.sqrt(float(rest.square().sum()) * number / (number - 1)) / float(counts.sum())
    return error if math.isfinite(error) else None


def _largest_token(batch: Predictions) -> int:
    ids = [batch.inputs.get(name) for name in ("input_ids", "decoder_input_ids")]
    return max(int(tokens.max()) for tokens in (*ids, batch.targets) if isinstance(tokens, torch.Tensor))
