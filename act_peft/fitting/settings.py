"""The three numbers that say which change is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from act_peft.checks import finite_number


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What the objective of a fit weighs against what; formulas in `fit`.

    Args:
        keep_weight: μ, how much a change of the outputs on the data to keep counts, 0 or greater; without such data it
            says nothing.
        ridge: ε, how much a distance from the prior counts, in units of the inputs' mean square; greater than 0.
        prior_scale: λ, the share of the donor's difference that is taken where no data say anything; any finite
            number, 0 for the base and 1 for the donor.

    Raises:
        ActTypeError: not a number.
        ActValueError: a number out of its range.
    """

    keep_weight: float = 1.0
    ridge: float = 0.03
    prior_scale: float = 0.0

    def __post_init__(self) -> None:
        checked = {
            "keep_weight": finite_number(self.keep_weight, "keep_weight", least=0),
            "ridge": finite_number(self.ridge, "ridge", above=0),
            "prior_scale": finite_number(self.prior_scale, "prior_scale"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
