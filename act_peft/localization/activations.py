"""Scores by activations: both models read the same tokens, and the differences of their outputs are added up."""

from __future__ import annotations

import torch
from torch import nn

from act_peft.batches.answer_tokens import find_answer_tokens
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.channels.spread import Spread
from act_peft.localization.candidates import Candidates
from act_peft.localization.comparison import BatchComparison
from act_peft.localization.groups import Group, Groups
from act_peft.localization.sums import ChannelSums
from act_peft.localization.vocabulary import CommonVocabulary


def score_activations(
    base: nn.Module, donor: nn.Module, candidates: Candidates, groups: Groups, *, show_progress: bool
) -> dict[str, ChannelScores]:
    """Mean absolute difference of the outputs at the answer tokens; formula and errors as in `localize`."""
    return {
        name: _differences(base, donor, candidates, group, show_progress=show_progress).scores()
        for name, group in groups.items()
    }


def score_contrasts(
    base: nn.Module, donor: nn.Module, candidates: Candidates, groups: Groups, *, keep: Group, show_progress: bool
) -> dict[str, ChannelScores]:
    """The same on the ability, divided by the same on the data to keep; formula and errors as in `localize`."""
    kept = _differences(base, donor, candidates, keep, show_progress=show_progress).scores(spread=False)
    return {
        name: _differences(base, donor, candidates, group, show_progress=show_progress).scores(keep=kept)
        for name, group in groups.items()
    }


def _differences(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    group: Group,
    *,
    show_progress: bool,
) -> _Differences:
    """The absolute differences of the outputs, summed over the answer tokens of all batches."""
    vocabulary = CommonVocabulary(base, donor)
    totals = _Differences(candidates)

    def compare(batch: Batch) -> None:
        tokens = find_answer_tokens(batch)
        vocabulary.check(batch)
        comparison = BatchComparison(candidates, tokens)
        with comparison.reading_base():
            forward(base, batch)
        with comparison.reading_donor():
            forward(donor, batch)
        totals.add_(comparison.sums(), tokens.per_sample)

    with evaluation(base, donor):
        over_batches(group.batches, compare, argument=group.argument, show_progress=show_progress)
    return totals


class _Differences:
    """Sums over all samples so far of S, S^2 and S n: a sample's sum of differences S and its number of tokens n."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._sums, self._squares, self._products = (ChannelSums(candidates.num_comparable) for _ in range(3))
        self._num_samples = self._token_squares = 0

    def add_(self, sums: dict[str, torch.Tensor], per_sample: torch.Tensor) -> None:
        """Add the sums `[B, C]` and the numbers of tokens `[B]` of a batch."""
        num_tokens = int(per_sample.sum())
        counts: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        for values in sums.values():
            counts.setdefault((values.device, values.dtype), per_sample.to(values))
        self._sums.add_({name: values.sum(0) for name, values in sums.items()}, num_tokens)
        self._squares.add_({name: values.square().sum(0) for name, values in sums.items()}, num_tokens)
        self._products.add_({n: counts[v.device, v.dtype] @ v for n, v in sums.items()}, num_tokens)
        self._num_samples += int((per_sample > 0).sum())
        self._token_squares += int(per_sample.square().sum())

    def scores(self, *, keep: ChannelScores | None = None, spread: bool = True) -> ChannelScores:
        """The scores by activation, or by contrast to those on the data to keep."""
        padded = self._candidates.padded
        return ChannelScores(
            padded(self._sums.sums),
            self._sums.num_tokens,
            kind=ScoreKind.ACTIVATION if keep is None else ScoreKind.CONTRAST,
            num_comparable=self._candidates.num_comparable,
            keep=keep,
            spread=Spread(
                padded(self._squares.sums), padded(self._products.sums), self._num_samples, self._token_squares
            )
            if spread and keep is None
            else None,
        )
