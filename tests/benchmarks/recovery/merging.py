"""Weight-space merges of the donor's whole difference onto the base, with PEFT's functions; nothing trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, task_arithmetic, ties

from tests.benchmarks.recovery.families import Family

Merge = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


def merged(family: Family, merge: Merge, scale: float) -> Any:
    """The base with `merge([donor - base], [scale])` added to every parameter."""
    model, weights = family.base(), torch.tensor([scale])
    donor = dict(family.donor().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += merge([donor[name] - parameter], weights)
    return model


def with_task_arithmetic(family: Family, scale: float) -> Any:
    """The base plus λ times the difference (Ilharco et al., 2023)."""
    return merged(family, task_arithmetic, scale)


def with_ties(family: Family, scale: float, density: float) -> Any:
    """The same after trimming every tensor to its largest entries (Yadav et al., 2023); signs agree with one donor."""
    return merged(family, lambda tensors, weights: ties(tensors, weights, density), scale)


def with_dare(family: Family, scale: float, density: float) -> Any:
    """The same after dropping entries at random and rescaling the others (Yu et al., 2024)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return merged(family, lambda tensors, weights: dare_linear(tensors, weights, density), scale)
