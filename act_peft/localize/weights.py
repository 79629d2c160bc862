"""Scores by weights: how much the parameters of a channel differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from act_peft.localize.candidates import Candidates
from act_peft.localize.parameters import ParameterPair, parameter_pairs
from act_peft.localize.sums import sum_per_channel
from act_peft.scores import ChannelScores, ScoreKind


def score_weights(candidates: Candidates) -> ChannelScores:
    """Euclidean norm of the change of a channel's weight and bias; formula and errors as in `localize`."""
    norms = {name: _norms(pairs) for name, pairs in parameter_pairs(candidates).items()}
    return ChannelScores(candidates.padded(norms), 0, kind=ScoreKind.WEIGHT, num_comparable=candidates.num_comparable)


def _norms(pairs: Sequence[ParameterPair]) -> torch.Tensor:
    squares = [
        sum_per_channel(
            lambda donor, base: (donor - base).square_(), (pair.donor, pair.base), channel_dim=pair.channel_dim
        ).to("cpu", torch.float64)
        for pair in pairs
    ]  # [C] each
    return torch.stack(squares).sum(0).sqrt_()
