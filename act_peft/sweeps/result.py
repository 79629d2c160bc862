"""The result of a sweep: a table, its Pareto front and a recommendation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from act_peft.channels.masks import ChannelMask
from act_peft.channels.selection import Normalization, Scope
from act_peft.errors import ActValueError
from act_peft.sweeps.choice import loss_front, pareto_front, recommend, recommend_by_loss
from act_peft.sweeps.methods import Method
from act_peft.sweeps.rows import Measurement, SweepRow, against
from act_peft.tables import aligned

# What interpolation is as a fit: so large a ridge that only the prior counts.
_LARGE_RIDGE = 1e9
_FIT = ("keep_weight", "ridge", "prior_scale")


@dataclass(frozen=True, repr=False)
class SweepResult:
    """Every setting of a sweep; `print` shows the table.

    Attributes:
        rows: one for every setting: channels by scores first, densities and then scales ascending; then the other
            methods.
        base: the base, density 0.
        donor: the figures of the donor, if it is a model in memory that knows the tokens of the data.
        max_drop: greatest allowed loss of token accuracy on a skill to keep, as a share; None with `max_keep_loss`.
        scope: as in `ChannelScores.top`.
        normalize: as in `ChannelScores.top`.
        masks: density -> its mask, of the channels by scores.
        max_keep_loss: greatest allowed rise of the loss on a skill to keep, in nats per token; None with `max_drop`.
    """

    rows: tuple[SweepRow, ...]
    base: SweepRow
    donor: Measurement | None
    max_drop: float | None
    scope: Scope
    normalize: Normalization
    masks: Mapping[float, ChannelMask] = field(compare=False)
    max_keep_loss: float | None = None

    @property
    def front(self) -> tuple[SweepRow, ...]:
        """The rows, and the base, that no other row beats: by accuracies, with `max_keep_loss` by losses."""
        rows = (self.base, *self.rows)
        return pareto_front(rows) if self.max_keep_loss is None else loss_front(rows, self.base)

    @property
    def recommended(self) -> SweepRow | None:
        """The setting that the rule chooses; None if no setting satisfies the rule."""
        if self.max_keep_loss is not None:
            return recommend_by_loss(self.rows, self.base, max_keep_loss=self.max_keep_loss)
        return recommend(self.rows, self.base, max_drop=self.max_drop or 0.0)

    @property
    def rule(self) -> str:
        """The rule of the recommendation, as text."""
        if self.max_keep_loss is not None:
            return (
                "the lowest loss on the ability among the settings that raise the loss of no kept skill by more than "
                f"{self.max_keep_loss:g} nats per token; a simpler one if the difference is below one standard error"
            )
        return (
            "the highest token accuracy on the ability among the settings that raise it and cost no kept skill more "
            f"than {100 * (self.max_drop or 0):g} points; among equals the lower density, then the lower scale"
        )

    @property
    def density(self) -> float:
        """The recommended density.

        Raises:
            ActValueError: there is no recommendation; so do `transfer_scale`, `mask` and `fit_settings`.
        """
        return self._recommendation().density

    @property
    def transfer_scale(self) -> float:
        """The recommended transfer scale λ."""
        return self._recommendation().transfer_scale

    @property
    def mask(self) -> ChannelMask:
        """The mask of the recommended density, for `ActConfig(channels=...)`.

        Raises:
            ActValueError: something else than channels by scores is recommended.
        """
        best = self._recommendation()
        if best.method is not Method.CHANNELS:
            raise ActValueError(
                f"mask: got the recommendation {best.title}, expected channels by scores (see fit_settings, or "
                "sweep with methods=['channels'])"
            )
        return self.masks[best.density]

    @property
    def fit_settings(self) -> dict[str, float]:
        """The recommended `keep_weight`, `ridge` and `prior_scale`, for `fit(**result.fit_settings)`.

        Interpolation is a fit with so large a ridge that its data say nothing.

        Raises:
            ActValueError: neither a fit nor an interpolation is recommended.
        """
        best = self._recommendation()
        if best.method is Method.INTERPOLATION:
            return {"keep_weight": 1.0, "ridge": _LARGE_RIDGE, "prior_scale": best.transfer_scale}
        if not best.method.is_fitted:
            raise ActValueError(
                f"fit_settings: got the recommendation {best.title}, expected a fit or an interpolation (sweep "
                "with other methods)"
            )
        return {name: best.settings[name] for name in _FIT}

    def to_dict(self) -> dict[str, Any]:
        """Everything except the masks as plain values, for JSON."""
        front, best = self.front, self.recommended
        return {
            "scope": self.scope.value,
            "normalize": self.normalize.value,
            "max_drop": self.max_drop,
            "max_keep_loss": self.max_keep_loss,
            "rule": self.rule,
            "base": self.base.to_dict(),
            "donor": None if self.donor is None else self.donor.to_dict(),
            "rows": [
                row.to_dict()
                | {"against_base": against(row, self.base), "on_front": row in front, "recommended": row is best}
                for row in self.rows
            ],
            "recommended": None if best is None else best.setting_to_dict(),
        }

    def __repr__(self) -> str:
        best = self.recommended
        found = "none" if best is None else best.title
        return f"SweepResult({len(self.rows)} settings, recommended: {found})"

    def __str__(self) -> str:
        front, best = self.front, self.recommended
        compared = any(row.method is not Method.CHANNELS for row in self.rows)
        head = [*(("method", "setting") if compared else ("density", "scale")), "channels", "ability", "loss"]
        for skill in self.base.keep:
            head += [skill, "loss", *(["rise"] if self.max_keep_loss is not None else [])]
        lines = [[*head, ""]]
        for row in (self.base, *self.rows):
            what: tuple[str, ...] = (
                (row.method.value, row.description) if compared else (f"{row.density:g}", f"{row.transfer_scale:g}")
            )
            what = (*what, f"{row.num_channels}") if row is not self.base else ("base", "", "")
            mark = "recommended" if row is best else "front" if row in front else ""
            lines.append([*what, *self._numbers(row), mark])
        if self.donor is not None:
            lines.append(["donor", "", "", *self._numbers(self.donor), ""])
        table = aligned(lines, left=(0, *([1] if compared else []), len(lines[0]) - 1))  # the settings and the marks
        found = f"recommended: none of {len(self.rows)} settings" if best is None else f"recommended: {best.title}"
        title = f"token accuracy and loss on held-out data, {len(self.rows)} settings"
        if self.masks:
            title += f", scope {self.scope.value}"
        return "\n".join([title, *self._counts(), "", *table, "", f"{found} ({self.rule})", *self._gain()])

    def _numbers(self, row: Measurement) -> list[str]:
        texts = [f"{row.ability.accuracy:.3f}", f"{row.ability.loss:.3f}"]
        for name, result in row.keep.items():
            texts += [f"{result.accuracy:.3f}", f"{result.loss:.3f}"]
            if self.max_keep_loss is not None:
                texts.append("" if row is self.base else f"{result.rise_over(self.base.keep[name])[0]:+.3f}")
        return texts

    def _counts(self) -> list[str]:
        """How many tokens were counted, and how sure the base's losses are."""
        skills = {"ability": self.base.ability, **self.base.keep}
        texts = [
            f"{name} {result.num_tokens} tokens, standard error of the base's loss "
            + ("unknown" if result.loss_error is None else f"{result.loss_error:.3f}")
            for name, result in skills.items()
            if result.num_tokens is not None
        ]
        return ["; ".join(texts)] if texts else []

    def _gain(self) -> list[str]:
        """What the recommended setting changes, with standard errors."""
        best = self.recommended
        if best is None or self.max_keep_loss is None:
            return []
        skills = {"ability": (best.ability, self.base.ability)}
        skills |= {name: (result, self.base.keep[name]) for name, result in best.keep.items()}
        texts = []
        for name, (mine, theirs) in skills.items():
            rise, error = mine.rise_over(theirs)
            texts.append(f"{name} {rise:+.3f} ± {'unknown' if error is None else f'{error:.3f}'}")
        return [f"its losses against the base's: {', '.join(texts)}"]

    def _recommendation(self) -> SweepRow:
        best = self.recommended
        if best is None:
            advice = "max_drop" if self.max_keep_loss is None else "max_keep_loss"
            raise ActValueError(
                f"recommendation: got none of {len(self.rows)} settings, expected {self.rule} (allow a larger "
                f"{advice}, or try other densities and smaller scales; the table is in `rows`)"
            )
        return best
