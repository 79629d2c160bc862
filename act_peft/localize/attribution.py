"""Scores by first-order attribution: how much of the loss goes away with a channel's step towards the donor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from act_peft.errors import ActTypeError, ActValueError
from act_peft.localize.batches import Batch, forward, over_batches
from act_peft.localize.candidates import Candidates
from act_peft.localize.interpolation import InterpolatedModel
from act_peft.localize.parameters import ParameterPair, parameter_pairs
from act_peft.localize.predictions import find_predictions
from act_peft.localize.state import evaluation
from act_peft.localize.sums import ChannelSums, sum_per_channel
from act_peft.localize.vocabulary import CommonVocabulary
from act_peft.scores import ChannelScores, ScoreKind

POINTS = 4


def score_attributions(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    *,
    keep_dataloader: Iterable[Batch] | None,
    points: int,
    show_progress: bool,
) -> ChannelScores:
    """Minus gradient times difference, averaged over points between the models; as in `localize`.

    Raises:
        ActTypeError: `points` is no int.
        ActValueError: `points` is less than 1; a model without a loss; otherwise as in `localize`.
    """
    if not isinstance(points, int) or isinstance(points, bool):
        raise ActTypeError(f"points: got {points!r}, expected an int")
    if points < 1:
        raise ActValueError(f"points: got {points}, expected at least 1")
    attribution = _Attribution(base, donor, candidates, points)
    ability = attribution.over(dataloader, argument="dataloader", show_progress=show_progress)
    sums = ability.sums
    if keep_dataloader is not None:
        keep = attribution.over(keep_dataloader, argument="keep_dataloader", show_progress=show_progress)
        share = ability.num_tokens / keep.num_tokens
        sums = {name: values + keep.sums[name] * share for name, values in sums.items()}
    return ChannelScores(
        candidates.padded(sums),
        ability.num_tokens,
        kind=ScoreKind.ATTRIBUTION,
        num_comparable=candidates.num_comparable,
    )


class _Attribution:
    def __init__(self, base: nn.Module, donor: nn.Module, candidates: Candidates, points: int) -> None:
        self._vocabulary = CommonVocabulary(base, donor)
        self._num_comparable = candidates.num_comparable
        self._points = points
        self._base = base
        self._line = InterpolatedModel(base, parameter_pairs(candidates), self._collect)
        self._batch: dict[str, torch.Tensor] = {}

    def over(self, dataloader: Iterable[Batch], *, argument: str, show_progress: bool) -> ChannelSums:
        """The attributions of all batches, summed over tokens."""
        totals = ChannelSums(self._num_comparable, what="gradients that are")

        def attribute(batch: Batch) -> None:
            predictions = find_predictions(batch)
            labels, num_tokens = predictions.labels(), predictions.targets.numel()
            self._vocabulary.check(batch)
            self._batch = {
                name: torch.zeros(count, dtype=torch.float64) for name, count in self._num_comparable.items()
            }
            for point in range(self._points):
                if self._points > 1:
                    self._line.move_(point / self._points)
                with torch.enable_grad():
                    _loss_of(forward(self._line.model, batch, labels=labels), self._line.model).backward()
            # The loss is a mean over the batch's tokens: times their number, it is a sum.
            totals.add_(
                {name: values * (num_tokens / self._points) for name, values in self._batch.items()}, num_tokens
            )

        with evaluation(self._base, self._line.model):
            over_batches(dataloader, attribute, argument=argument, show_progress=show_progress)
        return totals

    def _collect(self, name: str, gradient: torch.Tensor, pair: ParameterPair) -> None:
        decrease = sum_per_channel(
            lambda slope, donor, base: slope * (base - donor),
            (gradient, pair.donor, pair.base),
            channel_dim=pair.channel_dim,
        )
        self._batch[name] += decrease.to("cpu", torch.float64)


def _loss_of(output: object, model: nn.Module) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ActValueError(
            f"{type(model).__name__}: gave no loss for labels, expected a model that does, such as "
            "AutoModelForCausalLM (or use score='activation')"
        )
    if not loss.requires_grad:
        raise ActValueError(
            f"{type(model).__name__}: the loss does not depend on the candidates, expected a gradient (does the model "
            "run without gradients inside?)"
        )
    return loss
