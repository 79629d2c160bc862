"""Scores by activations: both models read the same tokens, and the differences of their outputs are added up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from torch import nn

from act_peft.batches.answer_tokens import AnswerTokens, find_answer_tokens
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.localization.candidates import Candidates
from act_peft.localization.comparison import BatchComparison
from act_peft.localization.settings import Run
from act_peft.localization.sums import ChannelSums
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.shards import gathering, needs_every_process


def score_activations(
    base: nn.Module, donor: nn.Module, candidates: Candidates, dataloader: Iterable[Batch], run: Run
) -> ChannelScores:
    """Mean absolute difference of the outputs at the answer tokens; formula and errors as in `localize`."""
    return scores_of_sums(candidates, _differences(base, donor, candidates, dataloader, run, argument="dataloader"))


def score_contrasts(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    run: Run,
    *,
    keep_dataloader: Iterable[Batch],
) -> ChannelScores:
    """The same on the ability, divided by the same on the data to keep; formula and errors as in `localize`."""
    ability, keep = (
        _differences(base, donor, candidates, batches, run, argument=argument)
        for argument, batches in (("dataloader", dataloader), ("keep_dataloader", keep_dataloader))
    )
    return scores_of_sums(candidates, ability, kind=ScoreKind.CONTRAST, keep=scores_of_sums(candidates, keep))


def _differences(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    dataloader: Iterable[Batch],
    run: Run,
    *,
    argument: str,
) -> ChannelSums:
    """The absolute differences of the outputs, summed over the answer tokens of all batches of all processes."""
    vocabulary = CommonVocabulary(base, donor)
    totals = ChannelSums(candidates.num_comparable)
    progress = run.progress(candidates, totals, partial(scores_of_sums, candidates), argument=argument)
    together = needs_every_process(base) or needs_every_process(donor)
    pair = _Pair(base, donor, candidates, run.max_memory, alternate=not together)

    def compare(batch: Batch) -> None:
        if progress is not None and progress.is_done(batch):
            return
        tokens = find_answer_tokens(batch).at_most(run.max_tokens)
        vocabulary.check(batch)
        pair.add_differences(batch, tokens, totals)
        if progress is not None:
            progress.advance()

    with evaluation(base, donor), gathering(base, donor):
        over_batches(
            dataloader,
            compare,
            argument=argument,
            show_progress=run.show_progress,
            together=run.together,
            idle=pair.run if run.together and together else None,
        )
    if progress is not None:
        progress.write()
    if run.together:
        totals.gather_()
    return totals


class _Pair:
    """Base and donor, and how they read a batch so that few outputs are kept at a time.

    Args:
        base: the base.
        donor: the donor.
        candidates: the compared modules.
        max_memory: bytes for outputs of the base.
        alternate: whether the two models may take turns within a batch.
    """

    def __init__(
        self, base: nn.Module, donor: nn.Module, candidates: Candidates, max_memory: int, *, alternate: bool
    ) -> None:
        self._base, self._donor, self._candidates, self._max_memory = base, donor, candidates, max_memory
        shared = {id(module) for module in candidates.base.values()} & {id(m) for m in candidates.donor.values()}
        self._alternate = alternate and not shared  # an adapter runs in the base's own modules
        self._bytes_per_token = sum(candidates.num_comparable.values()) * _bytes_of_an_output(base)

    def add_differences(self, batch: Batch, tokens: AnswerTokens, totals: ChannelSums) -> None:
        """Run both models on a batch and add the differences of their outputs at some tokens."""
        fits = self._bytes_per_token * len(tokens) <= self._max_memory
        # Models that share modules run again for every part of the tokens.
        at_once = len(tokens) if fits or self._alternate else max(self._max_memory // self._bytes_per_token, 1)
        parts = math.ceil(len(tokens) / at_once)
        for part in tokens.parts(math.ceil(len(tokens) / parts)):
            comparison = BatchComparison(self._candidates, part)
            if fits or not self._alternate:
                with comparison.reading_base():
                    forward(self._base, batch)
                with comparison.reading_donor():
                    forward(self._donor, batch)
            else:
                comparison.take_turns(
                    partial(forward, self._base, batch),
                    partial(forward, self._donor, batch),
                    max_bytes=self._max_memory,
                )
            totals.add_(comparison.sums(), len(part))

    def run(self, batch: Batch) -> None:
        """Run both models on a batch."""
        forward(self._base, batch)
        forward(self._donor, batch)


def _bytes_of_an_output(model: nn.Module) -> int:
    """Bytes of a number in the outputs of a model; codes of quantized weights are smaller than what they stand for."""
    return max((parameter.element_size() for parameter in model.parameters()), default=4)


def scores_of_sums(
    candidates: Candidates,
    totals: ChannelSums,
    *,
    kind: ScoreKind = ScoreKind.ACTIVATION,
    keep: ChannelScores | None = None,
) -> ChannelScores:
    """Scores of running sums."""
    return ChannelScores(
        candidates.padded(totals.sums),
        totals.num_tokens,
        kind=kind,
        num_comparable=candidates.num_comparable,
        keep=keep,
    )
