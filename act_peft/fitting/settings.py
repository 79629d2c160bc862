"""The three numbers that say which change is fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from act_peft.errors import ActTypeError, ActValueError


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
        for name in ("keep_weight", "ridge", "prior_scale"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.keep_weight < 0:
            raise ActValueError(f"keep_weight: got {self.keep_weight}, expected 0 or greater")
        if self.ridge <= 0:
            raise ActValueError(
                f"ridge: got {self.ridge}, expected greater than 0 (inputs that no example has would be undetermined)"
            )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ActTypeError(f"{name}: got {value!r:.80}, expected a number")
    if not math.isfinite(value):
        raise ActValueError(f"{name}: got {value}, expected a finite number")
    return float(value)
