"""How much scores vary from sample to sample, from which their standard errors follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from act_peft.checks import MOST, whole_number
from act_peft.errors import ActTypeError, ActValueError


@dataclass(frozen=True, eq=False)
class Spread:
    """Sums over samples, beside the sums of the scores.

    A sample is a row of a batch. With S the sum of a channel's differences over the n counted tokens of one sample,
    the mean R = sum S / sum n is a ratio, and its standard error that of a ratio of sums over G samples:

        error = sqrt(G / (G - 1) * sum (S - R n)^2) / sum n

    So tokens of one sample count as dependent, as in `SkillResult`. Two spreads add up, like the sums themselves.

    Attributes:
        squares: module name -> sum of S^2, float64 `[C]`.
        products: module name -> sum of S n, float64 `[C]`.
        num_samples: number G of samples with a counted token.
        token_squares: sum of n^2.
    """

    squares: Mapping[str, torch.Tensor]
    products: Mapping[str, torch.Tensor]
    num_samples: int
    token_squares: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spread):
            return NotImplemented
        return (self.num_samples, self.token_squares) == (other.num_samples, other.token_squares) and all(
            mine.keys() == theirs.keys() and all(torch.equal(values, theirs[name]) for name, values in mine.items())
            for mine, theirs in ((self.squares, other.squares), (self.products, other.products))
        )

    def __add__(self, other: Spread) -> Spread:
        return Spread(
            {name: values + other.squares[name] for name, values in self.squares.items()},
            {name: values + other.products[name] for name, values in self.products.items()},
            self.num_samples + other.num_samples,
            self.token_squares + other.token_squares,
        )

    def standard_error(self, name: str, mean: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The standard error of a module's scores; at least two samples.

        Args:
            name: the module.
            mean: its scores R, float64 `[C]`.
            num_tokens: sum of n.

        Returns:
            Float64 `[C]`.
        """
        rest = self.squares[name] - 2 * mean * self.products[name] + mean.square() * self.token_squares
        return (rest.clamp_min(0) * (self.num_samples / (self.num_samples - 1))).sqrt() / num_tokens

    def checked(self, num_channels: Mapping[str, int]) -> Spread:
        """A copy in float64 on the CPU, for the channels of some scores.

        Raises:
            ActTypeError: no tensors of floating numbers, counts that are no integers.
            ActValueError: other modules or numbers of channels; a number that is negative or not finite; no sample.
        """
        squares, products = (
            _checked(what, values, num_channels)
            for what, values in (("squares", self.squares), ("products", self.products))
        )
        return Spread(
            squares,
            products,
            whole_number(self.num_samples, "num_samples", least=1, most=MOST),
            whole_number(self.token_squares, "token_squares", least=1, most=MOST),
        )


def _checked(what: str, given: Mapping[str, torch.Tensor], num_channels: Mapping[str, int]) -> dict[str, torch.Tensor]:
    if given.keys() != num_channels.keys():
        raise ActValueError(
            f"{what}: got {len(given)} modules, expected exactly the {len(num_channels)} modules of the scores"
        )
    found = {}
    for name, count in num_channels.items():
        values = given[name]
        if not isinstance(values, torch.Tensor) or not values.is_floating_point() or tuple(values.shape) != (count,):
            raise ActTypeError(f"{name}: {what}: got {_described(values)}, expected a floating point tensor [{count}]")
        values = values.detach().to(device="cpu", dtype=torch.float64, copy=True)
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ActValueError(f"{name}: {what}: got a number below 0 or not finite, expected sums of squares")
        found[name] = values
    return found


def _described(values: object) -> str:
    if isinstance(values, torch.Tensor):
        return f"{values.dtype} {list(values.shape)}"
    return type(values).__name__
