"""`fit`: the donor's difference, as much of it as the data ask for, in closed form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from act_peft.adapter.base_record import fingerprint
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch
from act_peft.channels.kinds import ChannelKind, weight_of
from act_peft.fitting.collection import Collector, Moments, Positions, shared_inputs
from act_peft.fitting.fitted import FittedModule, FittedTransfer
from act_peft.fitting.pair import FittedPair, find_pairs
from act_peft.fitting.settings import FitSettings
from act_peft.fitting.solution import solve_rows
from act_peft.fitting.tokens import solve_tied, solve_tokens
from act_peft.localization.pair import open_pair
from act_peft.localization.vocabulary import CommonVocabulary


class PairMoments:
    """The inputs of base and donors, from which any number of fits can be solved."""

    def __init__(self, base, donors, ability, keep, *, positions=Positions.ALL, target_modules=None, exclude_modules=None, show_progress=True):
        self.pairs = find_pairs(base, donors, target_modules=target_modules, exclude_modules=exclude_modules)
        linear = {
            name: base.get_submodule(name)
            for pair in self.pairs
            for name in ([] if pair.kind.is_norm else [pair.head] if pair.head else pair.names)
            if not pair.kind is ChannelKind.EMBEDDING or pair.head
        }
        with evaluation(base, *donors):
            leaders = shared_inputs(base, ability[0][0], linear)
            collector = Collector(self.pairs, leaders, num_donors=len(donors), positions=positions)
            for number, (donor, batches) in enumerate(zip(donors, ability)):
                collector.read(donor, number, batches, CommonVocabulary(base, donor), argument="ability_dataloader", show_progress=show_progress)
            if keep is not None:
                collector.read(base, len(donors), keep, CommonVocabulary(base, donors[0]), argument="keep_dataloader", show_progress=show_progress)
        self.moments = collector.moments()

    def solve_one(self, pair: FittedPair, settings: FitSettings, max_rank: int, tied_weight: float = 1.0) -> FittedModule:
        dtype = weight_of(pair.base).dtype
        bias, columns = None, None
        empty, none = torch.zeros(pair.num_rows, 0), torch.zeros(0, dtype=torch.float64)
        if pair.kind is ChannelKind.EMBEDDING:
            counts = self.moments.tokens[pair.name]
            if pair.head:
                head = self.moments.linear[pair.head].metric(settings)
                found = solve_tied(counts, head, pair.differences, settings, dtype=dtype, tied_weight=tied_weight)
            else:
                found = solve_tokens(counts, pair.differences, settings, width=pair.width, dtype=dtype)
            delta, gains, columns = found.delta, found.token_gains, found.column_gains
            directions, strengths = empty, none
        elif pair.kind.is_norm:
            delta, gains = self.moments.elements[pair.name].solve([d.cpu() for d in pair.differences(slice(None))], settings)
            directions, strengths = empty, none
            delta = delta.to(dtype)
        else:
            metric = self.moments.linear[pair.name].metric(settings)
            found = solve_rows(metric, pair.differences, pair.num_rows, max_rank=max_rank, dtype=dtype)
            delta, gains, directions, strengths = found.delta, found.gains, found.directions, found.strengths
        if pair.has_bias and pair.head is None:
            delta, bias = delta[:, :-1], delta[:, -1]
        return FittedModule(pair.names, pair.kind, delta.cpu(), bias, gains.cpu(), columns, directions.cpu(), strengths.cpu(), "")

    def solve(self, settings: FitSettings, *, max_rank: int = 0, tied_weight=1.0) -> FittedTransfer:
        modules = {p.name: self.solve_one(p, settings, max_rank, tied_weight) for p in self.pairs}
        return FittedTransfer(modules, settings, self.moments.num_tokens)
