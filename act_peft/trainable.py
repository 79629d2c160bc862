"""What of an adapter trains."""

from __future__ import annotations

from enum import Enum


class Trainable(Enum):
    """What of an adapter trains; `ActConfig.trainable`.

    DELTAS: the rows of the selected channels. SCALES: one scale per channel on the donor's frozen difference. BOTH:
    one scale per channel and the rows that it multiplies.
    """

    DELTAS = "deltas"
    SCALES = "scales"
    BOTH = "both"

    @property
    def has_scales(self) -> bool:
        """Whether an adapter has one scale per channel."""
        return self is not Trainable.DELTAS

    @property
    def trains_rows(self) -> bool:
        """Whether the rows train."""
        return self is not Trainable.SCALES
