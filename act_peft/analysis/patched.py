"""The result of patching: a table of shares of the loss gap, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from act_peft.analysis.tables import Table, percent
from act_peft.checks import finite_number, whole_number
from act_peft.errors import ActError, ActTypeError, ActValueError

KIND = "patching"


@dataclass(frozen=True)
class PatchedRow:
    """One mask whose activations were exchanged.

    Attributes:
        name: name of the mask; its density if it was selected from scores.
        channels: `"selected"`, or `"random"` for as many random channels of every module.
        density: density of the mask.
        num_channels: number of its channels.
        base_loss: loss of the base with the donor's activations, in nats per token.
        donor_loss: loss of the donor with the base's activations.
        sufficiency: share of the gap that the donor's activations close in the base; None without a gap.
        sufficiency_error: its standard error, for a gap that is exactly known.
        necessity: share of the gap that the base's activations open in the donor.
        necessity_error: its standard error.
    """

    name: str
    channels: str
    density: float
    num_channels: int
    base_loss: float
    donor_loss: float
    sufficiency: float | None
    sufficiency_error: float | None
    necessity: float | None
    necessity_error: float | None


@dataclass(frozen=True)
class Patching(Table):
    """What exchanged activations do to the loss; `print` shows the table.

    Attributes:
        rows: the masks in their order, each followed by its random ones.
        base_loss: loss of the base, in nats per token.
        donor_loss: loss of the donor.
        num_samples: number of samples.
        num_tokens: number of answer tokens.
        positions: where activations were exchanged: `"answer"` or `"all"`.
        seed: seed of the random channels.
    """

    rows: tuple[PatchedRow, ...]
    base_loss: float
    donor_loss: float
    num_samples: int
    num_tokens: int
    positions: str
    seed: int

    @property
    def title(self) -> str:
        """What was found, in one line: of the best selected mask and random channels of its density."""
        best = self.best
        if best is None:
            return f"the donor's loss {self.donor_loss:.3f} is not below the base's {self.base_loss:.3f}"
        random = [r.sufficiency for r in self.rows if r.channels != "selected" and r.name == best.name]
        known = [value for value in random if value is not None]
        against = f" (random channels: {percent(sum(known) / len(known))})" if known else ""
        return (
            f"the donor's activations of {percent(best.density)} of the channels close "
            f"{percent(best.sufficiency or 0.0)} of the loss gap{against}"
        )

    @property
    def best(self) -> PatchedRow | None:
        """The selected mask that the finding is about: the one that is farthest ahead of its random channels.

        Without random channels it is the one that closes most of the gap. None if there is no gap.
        """
        chance: dict[str, list[float]] = {}
        for row in self.rows:
            if row.channels != "selected" and row.sufficiency is not None:
                chance.setdefault(row.name, []).append(row.sufficiency)

        def lead(row: PatchedRow) -> float:
            random = chance.get(row.name, [])
            return (row.sufficiency or 0.0) - (sum(random) / len(random) if random else 0.0)

        selected = [row for row in self.rows if row.channels == "selected" and row.sufficiency is not None]
        return max(selected, key=lead, default=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """The losses of the models as they are."""
        return (
            f"loss of the base {self.base_loss:.4f}, of the donor {self.donor_loss:.4f} nats per token; "
            f"{self.num_samples} samples, {self.num_tokens} tokens; positions: {self.positions}; seed {self.seed}",
        )

    def records(self) -> list[dict[str, Any]]:
        """One row for each mask."""
        return [
            {
                "mask": row.name,
                "channels": row.channels,
                "number": row.num_channels,
                "base's loss": row.base_loss,
                "sufficiency": row.sufficiency,
                "±": row.sufficiency_error,
                "donor's loss": row.donor_loss,
                "necessity": row.necessity,
                "± ": row.necessity_error,
            }
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"kind": KIND} | asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Patching:
        """The result that `to_dict` wrote.

        Raises:
            ActValueError: it is something else, or damaged.
        """
        try:
            rows = given["rows"]
            if given.get("kind") != KIND or not isinstance(rows, list) or not rows:
                raise ActValueError(f"got kind {given.get('kind')!r:.40}, expected {KIND!r} with at least one row")
            return cls(
                rows=tuple(_row(row) for row in rows),
                base_loss=finite_number(given["base_loss"], "base_loss"),
                donor_loss=finite_number(given["donor_loss"], "donor_loss"),
                num_samples=whole_number(given["num_samples"], "num_samples", least=0),
                num_tokens=whole_number(given["num_tokens"], "num_tokens", least=1),
                positions=_text(given["positions"]),
                seed=whole_number(given["seed"], "seed", least=0),
            )
        except (ActError, KeyError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ActValueError(f"patching: {what} (the file is damaged, or of a different kind)") from error


def _row(given: Any) -> PatchedRow:
    if not isinstance(given, Mapping):
        raise ActTypeError(f"got a row of type {type(given).__name__}, expected an object")
    found: dict[str, Any] = {}
    for field in fields(PatchedRow):
        value = given[field.name]
        if field.name in ("name", "channels"):
            found[field.name] = _text(value)
        elif field.name == "num_channels":
            found[field.name] = whole_number(value, field.name, least=0)
        elif value is None and "None" in str(field.type):
            found[field.name] = None
        else:
            found[field.name] = finite_number(value, field.name)
    return PatchedRow(**found)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ActTypeError(f"got {value!r:.40}, expected a text")
    return value
