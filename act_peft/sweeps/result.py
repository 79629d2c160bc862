"""The result of a sweep: a table, its Pareto front and a recommendation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from act_peft.channels.masks import ChannelMask
from act_peft.channels.selection import Normalization, Scope
from act_peft.errors import ActValueError
from act_peft.sweeps.heldout import SkillResult
from act_peft.tables import aligned

_ROUNDING = 1e-9  # tolerance for rounding in differences of accuracies


@dataclass(frozen=True)
class Measurement:
    """Loss and accuracy of a model on the data of the ability and of every skill to keep."""

    ability: SkillResult
    keep: Mapping[str, SkillResult]

    @property
    def keep_accuracy(self) -> float:
        """Mean token accuracy over the skills to keep."""
        return sum(result.accuracy for result in self.keep.values()) / len(self.keep)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a loss that is not finite is None."""
        return {
            "ability": _plain(self.ability),
            "keep": {name: _plain(result) for name, result in self.keep.items()},
        }


@dataclass(frozen=True)
class SweepRow(Measurement):
    """The base with some channels transferred.

    Attributes:
        density: requested share of the channels; 0 for the base itself.
        transfer_scale: λ; 0 for the base itself.
        num_channels: number of transferred channels.
    """

    density: float
    transfer_scale: float
    num_channels: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a loss that is not finite is None."""
        setting = {
            "density": self.density,
            "transfer_scale": self.transfer_scale,
            "num_channels": self.num_channels,
        }
        return setting | super().to_dict()


@dataclass(frozen=True, repr=False)
class SweepResult:
    """Every setting of a sweep; `print` shows the table.

    Attributes:
        rows: one for every density and transfer scale, densities and then scales ascending.
        base: the base, density 0.
        donor: the figures of the donor, if it is a model in memory that knows the tokens of the data.
        max_drop: greatest allowed loss of token accuracy on a skill to keep, as a share.
        scope: as in `ChannelScores.top`.
        normalize: as in `ChannelScores.top`.
        masks: density -> its mask.
    """

    rows: tuple[SweepRow, ...]
    base: SweepRow
    donor: Measurement | None
    max_drop: float
    scope: Scope
    normalize: Normalization
    masks: Mapping[float, ChannelMask] = field(compare=False)

    @property
    def front(self) -> tuple[SweepRow, ...]:
        """`pareto_front` of the base and all settings."""
        return pareto_front((self.base, *self.rows))

    @property
    def recommended(self) -> SweepRow | None:
        """The setting that `recommend` chooses; None if no setting satisfies the rule."""
        return recommend(self.rows, self.base, max_drop=self.max_drop)

    @property
    def rule(self) -> str:
        """The rule of the recommendation, as text."""
        return (
            "the highest token accuracy on the ability among the settings that raise it and cost no kept skill more "
            f"than {100 * self.max_drop:g} points; among equals the lower density, then the lower scale"
        )

    @property
    def density(self) -> float:
        """The recommended density.

        Raises:
            ActValueError: there is no recommendation; so do `transfer_scale` and `mask`.
        """
        return self._recommendation().density

    @property
    def transfer_scale(self) -> float:
        """The recommended transfer scale λ."""
        return self._recommendation().transfer_scale

    @property
    def mask(self) -> ChannelMask:
        """The mask of the recommended density, for `ActConfig(channels=...)`."""
        return self.masks[self.density]

    def to_dict(self) -> dict[str, Any]:
        """Everything except the masks as plain values, for JSON."""
        front, best = self.front, self.recommended
        return {
            "scope": self.scope.value,
            "normalize": self.normalize.value,
            "max_drop": self.max_drop,
            "rule": self.rule,
            "base": self.base.to_dict(),
            "donor": None if self.donor is None else self.donor.to_dict(),
            "rows": [row.to_dict() | {"on_front": row in front, "recommended": row is best} for row in self.rows],
            "recommended": None
            if best is None
            else {"density": best.density, "transfer_scale": best.transfer_scale, "num_channels": best.num_channels},
        }

    def __repr__(self) -> str:
        best = self.recommended
        found = "none" if best is None else f"density {best.density:g}, scale {best.transfer_scale:g}"
        return f"SweepResult({len(self.rows)} settings, recommended: {found})"

    def __str__(self) -> str:
        front, best = self.front, self.recommended
        skills = ["ability", *self.base.keep]
        lines = [["density", "scale", "channels", *(text for skill in skills for text in (skill, "loss")), ""]]
        for row in (self.base, *self.rows):
            setting = [f"{row.density:g}", f"{row.transfer_scale:g}", f"{row.num_channels}"]
            if row is self.base:
                setting = ["base", "", ""]
            mark = "recommended" if row is best else "front" if row in front else ""
            lines.append([*setting, *_numbers(row), mark])
        if self.donor is not None:
            lines.append(["donor", "", "", *_numbers(self.donor), ""])
        table = aligned(lines, left=(0, len(lines[0]) - 1))  # the settings and the marks
        found = f"recommended: none of {len(self.rows)} settings" if best is None else f"recommended: {_setting(best)}"
        title = f"token accuracy and loss on held-out data, {len(self.rows)} settings, scope {self.scope.value}"
        return "\n".join([title, "", *table, "", f"{found} ({self.rule})"])

    def _recommendation(self) -> SweepRow:
        best = self.recommended
        if best is None:
            raise ActValueError(
                f"recommendation: got none of {len(self.rows)} settings, expected {self.rule} (allow a larger "
                "max_drop, or try other densities and smaller scales; the table is in `rows`)"
            )
        return best


def pareto_front(rows: Iterable[SweepRow]) -> tuple[SweepRow, ...]:
    """The rows that no other row beats, by the accuracy on the ability and the mean accuracy on the skills to keep.

    A row beats another one if both accuracies are at least as high and one is higher. Of rows with equal accuracies
    only the one with the lowest density stays, then the lowest transfer scale.

    Returns:
        The rows, with the accuracy on the ability ascending, so that on the skills to keep descends.
    """
    front: list[SweepRow] = []
    order = sorted(rows, key=lambda row: (-row.ability.accuracy, -row.keep_accuracy, *_cost(row)))
    for row in order:
        if not front or row.keep_accuracy > front[-1].keep_accuracy:
            front.append(row)
    return tuple(reversed(front))


def recommend(rows: Iterable[SweepRow], base: SweepRow, *, max_drop: float) -> SweepRow | None:
    """The row with the highest accuracy on the ability among those that raise it and keep every skill.

    Args:
        rows: the settings.
        base: the base, for comparison.
        max_drop: greatest allowed loss of accuracy on a skill to keep, compared with the base, as a share.

    Returns:
        Among equals the row with the lowest density, then the lowest transfer scale; None if there is no such row.
    """
    allowed = [
        row
        for row in rows
        if row.ability.accuracy > base.ability.accuracy
        and all(base.keep[n].accuracy - result.accuracy <= max_drop + _ROUNDING for n, result in row.keep.items())
    ]
    return min(allowed, key=lambda row: (-row.ability.accuracy, *_cost(row)), default=None)


def _cost(row: SweepRow) -> tuple[float, float]:
    return row.density, row.transfer_scale


def _setting(row: SweepRow) -> str:
    return f"density {row.density:g}, scale {row.transfer_scale:g}"


def _plain(result: SkillResult) -> dict[str, float | None]:
    return {"loss": result.loss if math.isfinite(result.loss) else None, "accuracy": result.accuracy}


def _numbers(row: Measurement) -> list[str]:
    return [text for r in (row.ability, *row.keep.values()) for text in (f"{r.accuracy:.3f}", f"{r.loss:.3f}")]
