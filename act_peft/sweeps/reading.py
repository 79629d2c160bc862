"""The result of a sweep, from the JSON that `SweepResult.to_dict` gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from act_peft.channels.selection import Normalization, Scope
from act_peft.checks import finite_number, member_of, whole_number
from act_peft.errors import ActError, ActTypeError, ActValueError
from act_peft.sweeps.heldout import SkillResult
from act_peft.sweeps.methods import Method
from act_peft.sweeps.result import SweepResult
from act_peft.sweeps.rows import Measurement, SweepRow


@dataclass(frozen=True, repr=False)
class RecordedSweep(SweepResult):
    """A result without masks and standard errors; what it recommends was found when they were known.

    Attributes:
        recorded_best: number of the recommended row; None if there is none.
        recorded_front: numbers of the rows on the front.
    """

    recorded_best: int | None = None
    recorded_front: tuple[int, ...] = ()

    @property
    def front(self) -> tuple[SweepRow, ...]:
        """The rows on the front; the base if nothing beats it."""
        rows = tuple(self.rows[number] for number in self.recorded_front)
        return (self.base, *rows) if self.base in super().front else rows

    @property
    def recommended(self) -> SweepRow | None:
        """The row that the sweep recommended."""
        return None if self.recorded_best is None else self.rows[self.recorded_best]


def read_sweep(given: Mapping[str, Any]) -> RecordedSweep:
    """The result that `to_dict` gave.

    Raises:
        ActValueError: it is something else, or damaged.
    """
    try:
        rows = given["rows"]
        if not isinstance(rows, list) or not rows:
            raise ActTypeError(f"rows: got {type(rows).__name__}, expected a list with at least one row")
        base = _row(given["base"])
        limits = {name: _number_or_none(given[name], name) for name in ("max_drop", "max_keep_loss")}
        marks = [(bool(row.get("recommended")), bool(row.get("on_front"))) for row in map(_as_object, rows)]
        found = RecordedSweep(
            rows=tuple(map(_row, rows)),
            base=base,
            donor=None if given["donor"] is None else Measurement(*_skills(_object(given["donor"], "donor"))),
            scope=member_of(Scope, given["scope"], "scope"),
            normalize=member_of(Normalization, given["normalize"], "normalize"),
            masks={},
            recorded_best=next((number for number, (best, _) in enumerate(marks) if best), None),
            recorded_front=tuple(number for number, (_, front) in enumerate(marks) if front),
            **limits,
        )
        measured = [base, *found.rows, *([] if found.donor is None else [found.donor])]
        if any(row.keep.keys() != base.keep.keys() for row in measured):
            raise ActValueError("rows: got different skills to keep, expected those of the base in every row")
        return found
    except (ActError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ActValueError(f"sweep: {what} (the file is damaged, or of a different kind)") from error


def _row(given: Any) -> SweepRow:
    row = _object(given, "row")
    settings = _object(row["settings"], "settings")
    return SweepRow(
        *_skills(row),
        density=finite_number(row["density"], "density"),
        transfer_scale=finite_number(row["transfer_scale"], "transfer_scale"),
        num_channels=whole_number(row["num_channels"], "num_channels", least=0),
        method=member_of(Method, row["method"], "method"),
        settings={str(name): finite_number(value, str(name)) for name, value in settings.items()},
    )


def _skills(given: Mapping[str, Any]) -> tuple[SkillResult, dict[str, SkillResult]]:
    keep = _object(given["keep"], "keep")
    if not keep:
        raise ActValueError("keep: got no skill, expected at least one")
    return _skill(given["ability"]), {str(name): _skill(value) for name, value in keep.items()}


def _skill(given: Any) -> SkillResult:
    skill = _object(given, "skill")
    loss = _number_or_none(skill["loss"], "loss")
    return SkillResult(math.nan if loss is None else loss, finite_number(skill["accuracy"], "accuracy"))


def _as_object(given: Any) -> Mapping[str, Any]:
    return _object(given, "row")


def _object(given: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ActTypeError(f"{what}: got {type(given).__name__}, expected an object")
    return given


def _number_or_none(given: Any, what: str) -> float | None:
    return None if given is None else finite_number(given, what)
