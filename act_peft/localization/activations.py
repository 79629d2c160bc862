"""Scores by activations: both models read the same tokens, and the differences of their outputs are added up."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from act_peft.batches.answer_tokens import AnswerTokens, find_answer_tokens
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.channels.scores import ChannelScores
from act_peft.localization.candidates import Candidates
from act_peft.localization.comparison import BatchComparison
from act_peft.localization.differences import Differences
from act_peft.localization.groups import Group, Groups
from act_peft.localization.settings import Run
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.shards import gathering, needs_every_process


def score_activations(
    base: nn.Module, donor: nn.Module, candidates: Candidates, groups: Groups, run: Run
) -> dict[str, ChannelScores]:
    """Mean absolute difference of the outputs at the answer tokens; formula and errors as in `localize`."""
    return {name: _differences(base, donor, candidates, group, run).scores() for name, group in groups.items()}


def score_contrasts(
    base: nn.Module, donor: nn.Module, candidates: Candidates, groups: Groups, run: Run, *, keep: Group
) -> dict[str, ChannelScores]:
    """The same on the ability, divided by the same on the data to keep; formula and errors as in `localize`."""
    kept = _differences(base, donor, candidates, keep, run).scores(spread=False)
    return {
        name: _differences(base, donor, candidates, group, run).scores(keep=kept) for name, group in groups.items()
    }


def _differences(base: nn.Module, donor: nn.Module, candidates: Candidates, group: Group, run: Run) -> Differences:
    """The absolute differences of the outputs, summed over the answer tokens of all batches of all processes."""
    vocabulary = CommonVocabulary(base, donor)
    totals = Differences(candidates)
    progress = run.progress(candidates, totals, group)
    together = needs_every_process(base) or needs_every_process(donor)
    pair = _Pair(base, donor, candidates, run.max_memory, alternate=not together)

    def compare(batch: Batch) -> None:
        if progress is not None and progress.is_done(batch):
            return
        tokens = find_answer_tokens(batch).at_most(run.max_tokens)
        vocabulary.check(batch)
        totals.add_(pair.differences(batch, tokens), tokens.per_sample)
        if progress is not None:
            progress.advance()

    with evaluation(base, donor), gathering(base, donor):
        over_batches(
            group.batches,
            compare,
            argument=group.argument,
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

    def differences(self, batch: Batch, tokens: AnswerTokens) -> dict[str, torch.Tensor]:
        """Run both models on a batch: module name -> sums of differences at some tokens of each sample, `[B, C]`."""
        fits = self._bytes_per_token * len(tokens) <= self._max_memory
        # Models that share modules run again for every part of the tokens.
        at_once = len(tokens) if fits or self._alternate else max(self._max_memory // self._bytes_per_token, 1)
        count = math.ceil(len(tokens) / at_once)
        sums: dict[str, torch.Tensor] = {}
        for part in tokens.parts(math.ceil(len(tokens) / count)):
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
            found = comparison.sums()
            sums = {name: sums[name].add_(values) for name, values in found.items()} if sums else found
        return sums

    def run(self, batch: Batch) -> None:
        """Run both models on a batch."""
        forward(self._base, batch)
        forward(self._donor, batch)


def _bytes_of_an_output(model: nn.Module) -> int:
    """Bytes of a number in the outputs of a model; codes of quantized weights are smaller than what they stand for."""
    return max((parameter.element_size() for parameter in model.parameters()), default=4)
