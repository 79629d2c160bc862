"""The meanings of a score."""

from __future__ import annotations

from enum import Enum


class ScoreKind(Enum):
    """The meaning of a score; the formulas are in `localize`."""

    ACTIVATION = "activation"
    WEIGHT = "weight"
    ATTRIBUTION = "attribution"
    GAIN = "gain"
    CONTRAST = "contrast"

    @property
    def is_mean(self) -> bool:
        """Whether the scores are means over tokens, so that two runs can be pooled."""
        return self not in (ScoreKind.WEIGHT, ScoreKind.GAIN)
