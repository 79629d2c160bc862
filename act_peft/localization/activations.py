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
from act_peft.shards import gathering, needs_every_process


def score_activations(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    *,
    together: bool,
    show_progress: bool,
) -> ChannelScores:
    """Mean absolute difference of the outputs at the answer tokens; formula and errors as in `localize`."""
    settings = {"together": together, "show_progress": show_progress}
    ability = _differences(base, donor, candidates, dataloader, argument="dataloader", **settings)
    return _scores(candidates, ability)


def score_contrasts(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    *,
    keep_dataloader: Iterable[Batch],
    together: bool,
    show_progress: bool,
) -> ChannelScores:
    """The same on the ability, divided by the same on the data to keep; formula and errors as in `localize`."""
    ability, keep = (
        _differences(
            base, donor, candidates, batches, argument=argument, together=together, show_progress=show_progress
        )
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
    together: bool,
    show_progress: bool,
) -> ChannelSums:
    """The absolute differences of the outputs, summed over the answer tokens of all batches of all processes."""
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

    def run_both(batch: Batch) -> None:
        forward(base, batch)
        forward(donor, batch)

    spread = together and (needs_every_process(base) or needs_every_process(donor))
    with evaluation(base, donor), gathering(base, donor):
        over_batches(
            dataloader,
            compare,
            argument=argument,
            show_progress=show_progress,
            together=together,
            idle=run_both if spread else None,
        )
    if together:
        totals.gather_()
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
