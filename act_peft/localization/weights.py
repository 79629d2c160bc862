"""Scores by weights: how much the parameters of a channel differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from act_peft.channels.kinds import ChannelKind, kind_of
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.sums import sum_per_channel


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


@dataclass(frozen=True)
class ParameterPair:
    """The same parameter of both models, cut to the rows (tokens) that both have.

    Attributes:
        part: `"weight"` or `"bias"`.
        base: the base's values, a view of its parameter.
        donor: the donor's, of the same shape.
        channel_dim: axis of the channels.
    """

    part: str
    base: torch.Tensor
    donor: torch.Tensor
    channel_dim: int


def parameter_pairs(candidates: Candidates) -> dict[str, list[ParameterPair]]:
    """The weight and, where there is one, the bias of every candidate.

    Args:
        candidates: the compared modules, plain layers in both models.

    Raises:
        ActValueError: a parameter that only one model has, or of another shape.
    """
    return {name: _pairs_of(name, candidates) for name in candidates.base}


def _pairs_of(name: str, candidates: Candidates) -> list[ParameterPair]:
    kind = kind_of(candidates.base[name])
    pairs = []
    for part in ("weight", "bias"):
        mine, theirs = (getattr(models[name], part, None) for models in (candidates.base, candidates.donor))
        if mine is None and theirs is None:
            continue
        channel_dim = kind.axis_of(part)
        by_token = 0 if kind is ChannelKind.EMBEDDING else channel_dim  # another number of these is no other structure
        if mine is None or theirs is None or _without(mine, by_token) != _without(theirs, by_token):
            raise ActValueError(
                f"{name}: donor has {_in_words(theirs, part)}, the base has {_in_words(mine, part)}, expected the "
                "same (take two models of the same structure, or leave the module out with exclude_modules)"
            )
        common = min(mine.shape[by_token], theirs.shape[by_token])
        mine, theirs = (tensor.detach().narrow(by_token, 0, common) for tensor in (mine, theirs))
        pairs.append(ParameterPair(part, mine, theirs, channel_dim))
    return pairs


def _without(tensor: torch.Tensor, dim: int) -> list[int]:
    return [size for axis, size in enumerate(tensor.shape) if axis != dim]


def _in_words(tensor: torch.Tensor | None, part: str) -> str:
    return f"no {part}" if tensor is None else f"{part} {list(tensor.shape)}"
