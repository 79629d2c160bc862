"""Merges that look at weights alone: rules that say what is added to a parameter of the base.

Every rule is a function of the parameter's name and its difference D = donor - base (same shape, floating point); the
result has the shape and dtype of D. Nothing is run and nothing is trained:

    for name, parameter in base.named_parameters():
        parameter += rule(name, donor_parameters[name] - parameter)
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from act_peft.sweeps.methods import Method

_NUMBER = re.compile(r"\.(\d+)\.")
# Shares of all layers that a layer swap takes from either end.
_SWAPPED = (0.1, 0.2)
# Scales up to this one are doubled at the last layer by LiNeS.
_GROWING = 0.5
_KEPT = 0.5  # density of TIES and DARE


class WeightRule(ABC):
    """What is added to a parameter of the base."""

    @abstractmethod
    def __call__(self, name: str, difference: torch.Tensor) -> torch.Tensor:
        """The change of a parameter.

        Args:
            name: of the parameter, such as `model.layers.3.mlp.up_proj.weight`.
            difference: D, any shape, floating point.
        """

    method: ClassVar[Method]

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, float]:
        """Its settings, as they stand in a table."""

    @property
    def share(self) -> float:
        """The share of the values that move, from 0 to 1."""
        return 1.0

    @property
    @abstractmethod
    def factor(self) -> float:
        """The mean factor on the difference where it moves."""


@dataclass(frozen=True)
class Interpolation(WeightRule):
    """λ D of every parameter (WiSE-FT, arXiv 2109.01903; task arithmetic, arXiv 2212.04089).

    Args:
        scale: λ.
    """

    scale: float
    method: ClassVar[Method] = Method.INTERPOLATION

    def __call__(self, name: str, difference: torch.Tensor) -> torch.Tensor:
        """λ D."""
        return difference * self.scale

    @property
    def settings(self) -> Mapping[str, float]:
        """λ."""
        return {"scale": self.scale}

    @property
    def factor(self) -> float:
        """λ."""
        return self.scale


@dataclass(frozen=True)
class LayerSwap(WeightRule):
    """D of whole layers at either end, nothing elsewhere (arXiv 2410.01335).

    Args:
        first: how many layers from the first one on.
        last: how many layers up to the last one.
        num_layers: number of layers, see `count_layers`.
    """

    first: int
    last: int
    num_layers: int
    method: ClassVar[Method] = Method.LAYER_SWAP

    def __call__(self, name: str, difference: torch.Tensor) -> torch.Tensor:
        """D or 0."""
        layer = layer_of(name)
        swapped = layer is not None and (layer < self.first or layer >= self.num_layers - self.last)
        return difference if swapped else torch.zeros_like(difference)

    @property
    def settings(self) -> Mapping[str, float]:
        """How many layers."""
        return {"first": self.first, "last": self.last}

    @property
    def factor(self) -> float:
        """1."""
        return 1.0

    @property
    def share(self) -> float:
        """That of the layers."""
        return (self.first + self.last) / self.num_layers


@dataclass(frozen=True)
class LayerScaling(WeightRule):
    """λ D with a λ that grows along the layers (LiNeS, arXiv 2410.17146).

        λ_l = first + (last - first) * l / (L - 1)          for layer l of L

    What lies outside the layers (embedding, last norm, output layer) takes the mean of both.

    Args:
        first: λ of the first layer.
        last: λ of the last layer.
        num_layers: L, see `count_layers`.
    """

    first: float
    last: float
    num_layers: int
    method: ClassVar[Method] = Method.LINES

    def __call__(self, name: str, difference: torch.Tensor) -> torch.Tensor:
        """λ_l D."""
        layer = layer_of(name)
        depth = 0.5 if layer is None or self.num_layers < 2 else layer / (self.num_layers - 1)
        return difference * (self.first + (self.last - self.first) * depth)

    @property
    def settings(self) -> Mapping[str, float]:
        """λ of the first and of the last layer."""
        return {"first": self.first, "last": self.last}

    @property
    def factor(self) -> float:
        """The mean λ."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Ties(WeightRule):
    """λ of the largest entries of every parameter (TIES, arXiv 2306.01708). With one donor there is no vote on signs.

    Args:
        scale: λ.
        density: the share of the entries that is kept, above 0 and at most 1.
    """

    scale: float
    density: float
    method: ClassVar[Method] = Method.TIES

    def __call__(self, name: str, difference: torch.Tensor) -> torch.Tensor:
        """λ D, or 0 where |D| is small."""
        flat = difference.flatten()
        kept = flat.abs().topk(max(round(self.density * flat.numel()), 1), sorted=False).indices
        change = torch.zeros_like(flat)
        change[kept] = flat[kept] * self.scale
        return change.view_as(difference)

    @property
    def settings(self) -> Mapping[str, float]:
        """Share of the entries, and λ."""
        return {"density": self.density, "scale": self.scale}

    @property
    def share(self) -> float:
        """That of the entries."""
        return self.density

    @property
    def factor(self) -> float:
        """λ."""
        return self.scale


@dataclass(frozen=True)
class Dare(WeightRule):
    """λ / density of entries drawn at random (DARE, arXiv 2311.03099), so that the mean stays λ D.

    Args:
        scale: λ.
        density: the share of the entries that is kept, above 0 and at most 1.
        seed: of the drawing, which does not depend on the order of the parameters.
    """

    scale: float
    density: float
    seed: int = 0
    method: ClassVar[Method] = Method.DARE

    def __call__(self, name: str, difference: torch.Tensor) -> torch.Tensor:
        """λ D / density, or 0."""
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        kept = torch.rand(difference.shape, generator=generator) < self.density
        return difference * kept.to(difference.device) * (self.scale / self.density)

    @property
    def settings(self) -> Mapping[str, float]:
        """Share of the entries, and λ."""
        return {"density": self.density, "scale": self.scale}

    @property
    def share(self) -> float:
        """That of the entries."""
        return self.density

    @property
    def factor(self) -> float:
        """λ."""
        return self.scale


def layer_of(name: str) -> int | None:
    """The layer that a parameter lies in, the first number in its name; None outside the layers."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def count_layers(names: Iterable[str]) -> int:
    """The number of layers among parameters."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


def default_rules(methods: Iterable[Method], *, scales: Sequence[float], num_layers: int) -> list[WeightRule]:
    """The rules that a sweep tries.

    Args:
        methods: which of them; others than weight rules are passed over.
        scales: the λ of interpolation, TIES and DARE; LiNeS has a few of them as its mean.
        num_layers: number of layers; without at least two there are no rules by layers.
    """
    rules: dict[Method, list[WeightRule]] = {method: [] for method in Method}
    rules[Method.INTERPOLATION] = [Interpolation(scale) for scale in scales]
    rules[Method.TIES] = [Ties(scale, _KEPT) for scale in scales]
    rules[Method.DARE] = [Dare(scale, _KEPT) for scale in scales]
    if num_layers > 1:
        counts = sorted({max(round(share * num_layers), 1) for share in _SWAPPED})
        ends = [(count, 0) for count in counts] + [(0, count) for count in counts]
        rules[Method.LAYER_SWAP] = [LayerSwap(*end, num_layers) for end in ends]
        means = [scale for scale in scales if 0 < scale <= _GROWING]
        starts = [(part * scale, scale) for part in (0.0, 0.5) for scale in means]
        rules[Method.LINES] = [LayerScaling(first, 2 * mean - first, num_layers) for first, mean in starts]
    return [rule for method in methods for rule in rules[method]]
