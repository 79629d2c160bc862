"""Merges of the donor's difference into the base that look at weights alone; nothing is run and nothing trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, ties
from study import Study

Share = Callable[[str, torch.Tensor], torch.Tensor]  # name and difference of a parameter -> what is added


@torch.no_grad()
def merged(study: Study, share: Share) -> Any:
    """The base plus a share of the difference of every parameter; tied parameters are one."""
    model, donor = study.base(), dict(study.donor.named_parameters())
    for name, parameter in model.named_parameters():
        parameter += share(name, donor[name] - parameter)
    return model


def interpolation(study: Study, *, scale: float) -> Any:
    """λ of everything (WiSE-FT, arXiv 2109.01903; task arithmetic, arXiv 2212.04089)."""
    return merged(study, lambda name, difference: scale * difference)


def embedding_and_norms(study: Study, *, scale: float) -> Any:
    """λ of the token embedding, which is the output layer too, and of the norms, nothing else."""
    return merged(study, lambda name, difference: scale * difference * ("embed" in name or "norm" in name))


def ties_merge(study: Study, *, scale: float, density: float) -> Any:
    """λ of the largest entries (TIES, arXiv 2306.01708); with one donor all signs agree."""
    return merged(study, lambda name, difference: ties([difference], torch.tensor([scale]), density))


def dare_merge(study: Study, *, scale: float, density: float) -> Any:
    """λ of entries drawn at random, rescaled (DARE, arXiv 2311.03099)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        return merged(study, lambda name, difference: dare_linear([difference], torch.tensor([scale]), density))


def by_depth(study: Study, *, first: float, last: float) -> Any:
    """λ that grows or falls with the layer (LiNeS, arXiv 2410.17146); what lies outside the layers takes the mean."""
    deepest = study.reference.config.num_hidden_layers - 1

    def share(name: str, difference: torch.Tensor) -> torch.Tensor:
        layer = re.search(r"layers\.(\d+)\.", name)
        depth = int(layer[1]) / deepest if layer else 0.5
        return (first + (last - first) * depth) * difference

    return merged(study, share)


def layer_swap(study: Study, *, bottom: int, top: int) -> Any:
    """Whole layers of the donor at either end (arXiv 2410.01335)."""
    count = study.reference.config.num_hidden_layers

    def share(name: str, difference: torch.Tensor) -> torch.Tensor:
        layer = re.search(r"layers\.(\d+)\.", name)
        swapped = layer is not None and (int(layer[1]) < bottom or int(layer[1]) >= count - top)
        return difference * swapped

    return merged(study, share)
