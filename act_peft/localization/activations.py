"""Scores by activations: both models read the same tokens, and the differences of their outputs are added up."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from act_peft.batches.answer_tokens import find_answer_tokens
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.localization.candidates import Candidates
from act_peft.localization.comparison import BatchComparison
from act_peft.localization.sums import ChannelSums
from act_peft.localization.vocabulary import CommonVocabulary


def score_activations(
    base: nn.Module, donor: nn.Module, candidates: Candidates, dataloader: Iterable[Batch], *, show_progress: bool
) -> ChannelScores:
    """Mean absolute difference of the outputs at the answer tokens; formula and errors as in `localize`."""
    ability = _differences(base, donor, candidates, dataloader, argument="dataloader", show_progress=show_progress)
    return _scores(candidates, ability)


def score_contrasts(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    *,
    keep_dataloader: Iterable[Batch],
    show_progress: bool,
) -> ChannelScores:
    """The same on the ability, divided by the same on the data to keep; formula and errors as in `localize`."""
    ability, keep = (
        _differences(base, donor, candidates, batches, argument=argument, show_progress=show_progress)
        for argument, batches in (("dataloader", dataloader), ("keep_dataloader", keep_dataloader))
    )
    return _scores(candidates, ability, kind=ScoreKind.CONTRAST, keep=_scores(candidates, keep))


def _differences(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    *,
    argument: str,
    show_progress: bool,
) -> ChannelSums:
    """The absolute differences of the outputs, summed over the answer tokens of all batches."""
    vocabulary = CommonVocabulary(base, donor)
    totals = ChannelSums(candidates.num_comparable)

    def compare(batch: Batch) -> None:
        tokens = find_answer_tokens(batch)
        vocabulary.check(batch)
        comparison = BatchComparison(candidates, tokens)
        with comparison.reading_base():
            forward(base, batch)
        with comparison.reading_donor():
            forward(donor, batch)
        totals.add_(comparison.sums(), len(tokens))

    with evaluation(base, donor):
        over_batches(dataloader, compare, argument=argument, show_progress=show_progress)
    return totals


def _scores(
    candidates: Candidates,
    totals: ChannelSums,
    *,
    kind: ScoreKind = ScoreKind.ACTIVATION,
    keep: ChannelScores | None = None,
) -> ChannelScores:
    return ChannelScores(
        candidates.padded(totals.sums),
        totals.num_tokens,
        kind=kind,
        num_comparable=candidates.num_comparable,
        keep=keep,
    )
