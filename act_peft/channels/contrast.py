"""Scores by contrast: the difference on the ability, divided by the difference on the data to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOOR = 0.1  # of the mean difference of a module; a smaller divisor counts as this


def contrast(ability: torch.Tensor, keep: torch.Tensor, *, typical: float) -> torch.Tensor:
    """The scores of one module.

        score_i = ability_i / max(keep_i, 0.1 * typical)

    A channel that hardly moves on the data to keep would otherwise get an endless score by chance.

    Args:
        ability: mean absolute differences on the ability, `[C]`.
        keep: the same on the data to keep, `[C]`.
        typical: the mean of `keep` over the channels of the module. Where this is 0, the mean over all modules; 0
            only if every `ability` is 0.

    Returns:
        `[C]`; 0 where `ability` is 0.
    """
    return ability / keep.clamp_min(FLOOR * typical) if typical else torch.zeros_like(ability)


def mean_of_all(scores: Mapping[str, torch.Tensor], num_comparable: Mapping[str, int]) -> float:
    """Mean over the comparable channels of all modules; the scores of others are 0."""
    return sum(float(values.sum()) for values in scores.values()) / sum(num_comparable.values())
