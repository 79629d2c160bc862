"""Scores by weights: the size of the difference of a channel's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from act_peft.channels.kinds import ChannelKind, kind_of
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.sums import sum_per_channel
from act_peft.offloading import values_of
from act_peft.shards import full_shape


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
        modules: the plain layers in base and donor.
        channel_dim: axis of the channels.
        by_token: axis of the rows.
        common: number of rows that both have.
    """

    part: str
    modules: tuple[nn.Module, nn.Module]
    channel_dim: int
    by_token: int
    common: int

    @property
    def base(self) -> torch.Tensor:
        """Values of the base, a view of its parameter; read each time if accelerate keeps them elsewhere."""
        return values_of(self.modules[0], self.part).narrow(self.by_token, 0, self.common)

    @property
    def donor(self) -> torch.Tensor:
        """Values of the donor, of the same shape."""
        return values_of(self.modules[1], self.part).narrow(self.by_token, 0, self.common)


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
        modules = (candidates.base[name], candidates.donor[name])
        pairs.append(ParameterPair(part, modules, channel_dim, by_token, common))
    return pairs


def _without(tensor: torch.Tensor, dim: int) -> list[int]:
    return [size for axis, size in enumerate(full_shape(tensor)) if axis != dim]


def _shape_text(tensor: torch.Tensor | None, part: str) -> str:
    return f"no {part}" if tensor is None else f"{part} {list(full_shape(tensor))}"
