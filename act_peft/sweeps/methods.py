"""The methods that a sweep compares, and which of them is simpler."""

from __future__ import annotations

from enum import Enum


class Method(Enum):
    """What moves in the base.

    CHANNELS: the best channels by scores. INTERPOLATION, LAYER_SWAP, LINES, TIES, DARE: rules of weights alone, see
    `act_peft.sweeps.weight_rules`. FITTED: all changes of a fit; FITTED_ROWS: those of the rows that gain the most in
    every module; FITTED_RANK: those of a given rank.
    """

    BASE = "base"
    CHANNELS = "channels"
    INTERPOLATION = "interpolation"
    LAYER_SWAP = "layer-swap"
    LINES = "lines"
    TIES = "ties"
    DARE = "dare"
    FITTED = "fitted"
    FITTED_ROWS = "fitted-rows"
    FITTED_RANK = "fitted-rank"

    @property
    def is_fitted(self) -> bool:
        """Whether it needs data to fit on."""
        return self in (Method.FITTED, Method.FITTED_ROWS, Method.FITTED_RANK)

    @property
    def level(self) -> int:
        """How much it takes: 0 the base, 1 interpolation, 2 other rules of weights, 3 scored channels, 4 a fit."""
        return _LEVELS.get(self, 4 if self.is_fitted else 2)


_LEVELS = {Method.BASE: 0, Method.INTERPOLATION: 1, Method.CHANNELS: 3}
WEIGHT_RULES = (Method.INTERPOLATION, Method.LAYER_SWAP, Method.LINES, Method.TIES, Method.DARE)
FITTED = (Method.FITTED, Method.FITTED_ROWS, Method.FITTED_RANK)
