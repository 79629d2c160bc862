"""Scores by activations: run both models on the same tokens and sum up where their outputs differ."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from act_peft.localize.answer_tokens import find_answer_tokens
from act_peft.localize.batches import Batch, forward, over_batches
from act_peft.localize.candidates import Candidates
from act_peft.localize.comparison import BatchComparison
from act_peft.localize.state import evaluation
from act_peft.localize.sums import ChannelSums
from act_peft.localize.vocabulary import CommonVocabulary
from act_peft.scores import ChannelScores


def score_activations(
    base: nn.Module, donor: nn.Module, candidates: Candidates, dataloader: Iterable[Batch], *, show_progress: bool
) -> ChannelScores:
    """Mean absolute difference of the outputs at the answer tokens; formula and errors as in `localize`."""
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
        over_batches(dataloader, compare, argument="dataloader", show_progress=show_progress)
    return ChannelScores(candidates.padded(totals.sums), totals.num_tokens, num_comparable=candidates.num_comparable)
