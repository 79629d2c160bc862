"""The rows of a sweep's table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from act_peft.sweeps.heldout import SkillResult
from act_peft.sweeps.methods import Method


@dataclass(frozen=True)
class Measurement:
    """Loss and accuracy of a model on the data of the ability and of every skill to keep."""

    ability: SkillResult
    keep: Mapping[str, SkillResult]

    @property
    def keep_accuracy(self) -> float:
        """Mean token accuracy over the skills to keep."""
        return sum(result.accuracy for result in self.keep.values()) / len(self.keep)

    def keep_rise(self, base: Measurement) -> float:
        """How much the loss on a skill to keep is above the base's, in nats per token; the worst of them."""
        rises = [result.rise_over(base.keep[name])[0] for name, result in self.keep.items()]
        return math.inf if any(map(math.isnan, rises)) else max(rises)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a loss that is not finite is None."""
        return {
            "ability": _plain(self.ability),
            "keep": {name: _plain(result) for name, result in self.keep.items()},
        }


@dataclass(frozen=True)
class SweepRow(Measurement):
    """The base with some of the donor's difference in it.

    Attributes:
        density: share of what could move that does: of the channels; of the layers for a swap; of the values for TIES
            and DARE; 0 for the base itself.
        transfer_scale: λ, the factor on the difference, or the mean of several; 1 for a fit, 0 for the base itself.
        num_channels: number of channels (of an embedding: tokens) that move.
        method: what moves.
        settings: the method's own settings by name; empty for the base.
    """

    density: float
    transfer_scale: float
    num_channels: int
    method: Method = Method.CHANNELS
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """The settings in words."""
        settings = self.settings
        if self.method is Method.CHANNELS:
            settings = {"density": self.density, "scale": self.transfer_scale}
        return ", ".join(f"{name} {value:.3g}" for name, value in settings.items())

    @property
    def title(self) -> str:
        """Method and settings in words."""
        return self.description if self.method is Method.CHANNELS else f"{self.method.value}, {self.description}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a loss that is not finite is None."""
        return self.setting_to_dict() | super().to_dict()

    def setting_to_dict(self) -> dict[str, Any]:
        """What moves, without the measurement."""
        return {
            "method": self.method.value,
            "settings": dict(self.settings),
            "density": self.density,
            "transfer_scale": self.transfer_scale,
            "num_channels": self.num_channels,
        }


def against(row: Measurement, base: Measurement) -> dict[str, Any]:
    """By how much the losses are above the base's, with standard errors, as plain values."""

    def plain(one: SkillResult, other: SkillResult) -> dict[str, float | None]:
        rise, error = one.rise_over(other)
        return {"loss": _finite(rise), "standard_error": error}

    return {
        "ability": plain(row.ability, base.ability),
        "keep": {name: plain(result, base.keep[name]) for name, result in row.keep.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(result: SkillResult) -> dict[str, float | int | None]:
    found: dict[str, float | int | None] = {"loss": _finite(result.loss), "accuracy": result.accuracy}
    if result.samples is not None:
        found |= {
            "num_tokens": result.num_tokens,
            "loss_error": result.loss_error,
            "accuracy_error": result.accuracy_error,
        }
    return found
