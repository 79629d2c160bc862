"""Scores by weights: the size of the difference of a channel's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from act_peft.channels.kinds import ChannelKind, kind_of
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.sums import sum_per_channel
from act_peft.shards import full_shape, whole


def score_weights(candidates: Candidates) -> ChannelScores:
    """Euclidean norm of the difference of a channel's weight and bias; formula and errors as in `localize`."""
    norms = {name: _norms(_pairs_of(name, candidates)) for name in candidates.base}
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
    """A parameter of both models, cut to the rows (tokens) that both have.

    Attributes:
        part: `"weight"` or `"bias"`.
        base: values of the base, a view of its parameter if that is in one piece.
        donor: values of the donor, of the same shape.
        channel_dim: axis of the channels.
    """

    part: str
    base: torch.Tensor
    donor: torch.Tensor
    channel_dim: int


def parameter_pairs(candidates: Candidates) -> dict[str, list[ParameterPair]]:
    """The weight and, if there is one, the bias of every candidate.

    Args:
        candidates: the compared modules, plain layers in both models.

    Raises:
        ActValueError: a parameter that only one model has, or with different shapes.
    """
    return {name: _pairs_of(name, candidates) for name in candidates.base}


def _pairs_of(name: str, candidates: Candidates) -> list[ParameterPair]:
    kind = kind_of(candidates.base[name])
    pairs = []
    for part in ("weight", "bias"):
        base, donor = (getattr(models[name], part, None) for models in (candidates.base, candidates.donor))
        if base is None and donor is None:
            continue
        channel_dim = kind.axis_of(part)
        by_token = 0 if kind is ChannelKind.EMBEDDING else channel_dim  # axis of tokens: its size may differ
        if base is None or donor is None or _without(base, by_token) != _without(donor, by_token):
            raise ActValueError(
                f"{name}: donor has {_shape_text(donor, part)}, the base has {_shape_text(base, part)}, expected the "
                "same (take two models of the same structure, or leave the module out with exclude_modules)"
            )
        common = min(full_shape(tensor)[by_token] for tensor in (base, donor))
        base, donor = (whole(tensor).narrow(by_token, 0, common) for tensor in (base, donor))
        pairs.append(ParameterPair(part, base, donor, channel_dim))
    return pairs


def _without(tensor: torch.Tensor, dim: int) -> list[int]:
    return [size for axis, size in enumerate(full_shape(tensor)) if axis != dim]


def _shape_text(tensor: torch.Tensor | None, part: str) -> str:
    return f"no {part}" if tensor is None else f"{part} {list(full_shape(tensor))}"
