"""Which two models scores or a mask came from: names, and fingerprints by which they are recognized."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from act_peft.errors import ActValueError


@dataclass(frozen=True)
class ModelRecord:
    """A model, as a file remembers it.

    Attributes:
        name: Hub id or absolute folder; None where the model has none.
        fingerprints: module name -> hash of some rows of its weight; empty where they cannot be read.
    """

    name: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def differing(self, other: ModelRecord, modules: Iterable[str] | None = None) -> tuple[list[str], int]:
        """The modules with other weights, and how many could be compared.

        Args:
            other: another record.
            modules: only these modules.
        """
        among = self.fingerprints if modules is None else modules
        common = [name for name in among if name in self.fingerprints and name in other.fingerprints]
        return [name for name in common if self.fingerprints[name] != other.fingerprints[name]], len(common)

    def joined(self, other: ModelRecord) -> ModelRecord:
        """What two records of one model say together; nothing if they are of different models, or may be."""
        differing, compared = self.differing(other)
        if differing or (not compared and self.name != other.name):
            return ModelRecord()
        return ModelRecord(self.name or other.name, {**self.fingerprints, **other.fingerprints})

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {"name": self.name, "fingerprints": dict(self.fingerprints)}

    @classmethod
    def from_json(cls, value: Any) -> ModelRecord:
        """What `to_json` gave.

        Raises:
            ActValueError: it is something else.
        """
        found = value if isinstance(value, Mapping) else {}
        name, prints = found.get("name"), found.get("fingerprints")
        good = isinstance(prints, Mapping) and all(isinstance(text, str) for item in prints.items() for text in item)
        if not good or not isinstance(name, (str, type(None))):
            raise ActValueError(
                f"origin: got {str(value)[:80]}, expected name and fingerprints of a model (save the file again)"
            )
        return cls(name, dict(found["fingerprints"]))


@dataclass(frozen=True)
class Origin:
    """The base and the donor that scores or a mask were made with."""

    base: ModelRecord = field(default_factory=ModelRecord)
    donor: ModelRecord = field(default_factory=ModelRecord)

    @property
    def modules(self) -> list[str]:
        """The modules of which a fingerprint is known."""
        return list({**self.base.fingerprints, **self.donor.fingerprints})

    def joined(self, other: Origin | None) -> Origin:
        """What is the same in both; with None, this one."""
        return self if other is None else Origin(self.base.joined(other.base), self.donor.joined(other.donor))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {"base": self.base.to_json(), "donor": self.donor.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> Origin:
        """What `to_json` gave.

        Raises:
            ActValueError: it is something else.
        """
        if not isinstance(value, Mapping):
            raise ActValueError(f"origin: got {str(value)[:80]}, expected a base and a donor (save the file again)")
        return cls(ModelRecord.from_json(value.get("base")), ModelRecord.from_json(value.get("donor")))


Found = TypeVar("Found", bound="HasOrigin")


class HasOrigin:
    """What was found with two models, and may know which."""

    _origin: Origin | None = None

    @property
    def origin(self) -> Origin | None:
        """The two models that it was found with; None where they are not known."""
        return self._origin

    def with_origin(self: Found, origin: Origin | None) -> Found:
        """The same with another record of the two models."""
        made = copy.copy(self)
        object.__setattr__(made, "_origin", origin)
        return made


def join(first: Origin | None, second: Origin | None) -> Origin | None:
    """The origin of what is made of two things."""
    return second if first is None else first.joined(second)


def check_same_pair(first: Origin | None, second: Origin | None) -> None:
    """Check that two runs were of the same two models, as far as that is known.

    Raises:
        ActValueError: a model has other weights.
    """
    if first is None or second is None:
        return
    for role, left, right in (("base", first.base, second.base), ("donor", first.donor, second.donor)):
        differing, compared = left.differing(right)
        if differing:
            raise ActValueError(
                f"{differing[0]}: the {role}s of the two runs, {left.name or 'one without a name'} and "
                f"{right.name or 'one without a name'}, have different weights, expected two runs of the same pair of "
                f"models ({len(differing)} of {compared} modules differ)"
            )


def check_models(
    origin: Origin | None, *, base: ModelRecord, donor: ModelRecord | None = None, what: str = "the mask"
) -> list[str]:
    """Compare the models of a transfer with those that its channels were found with.

    Args:
        origin: of the mask, if it is known.
        base: the base of the transfer, with fingerprints of the same modules.
        donor: its donor, if there is one.
        what: the mask, for messages.

    Returns:
        One sentence for each model that is another one.

    Raises:
        ActValueError: base and donor are exchanged.
    """
    if origin is None:
        return []
    if _are_exchanged(origin, base, donor):
        raise ActValueError(
            f"{what} was made with {origin.base.name or 'another model'} as base and "
            f"{origin.donor.name or 'this one'} as donor, and now {base.name or 'that donor'} is the base, expected "
            "the same base (base and donor are exchanged; mask.with_origin(None) is the mask without this record)"
        )
    notes = []
    for role, recorded, found in (("base", origin.base, base), ("donor", origin.donor, donor)):
        differing, compared = recorded.differing(found) if found is not None else ([], 0)
        if differing:
            notes.append(
                f"{what} was made with a {role} with different weights than "
                f"{(found and found.name) or 'this one'}: {len(differing)} of {compared} modules differ, the first is "
                f"{differing[0]}"
            )
    return notes


def _are_exchanged(origin: Origin, base: ModelRecord, donor: ModelRecord | None) -> bool:
    """Whether the base of a transfer is the donor that its channels were found with; without weights, by names."""
    told, _ = origin.base.differing(origin.donor)
    if base.differing(origin.donor, told)[1]:
        return _is(base, origin.donor, told)
    names = (origin.base.name, origin.donor.name)
    return None not in names and names[0] != names[1] and donor is not None and (donor.name, base.name) == names


def _is(model: ModelRecord, recorded: ModelRecord, modules: list[str]) -> bool:
    """Whether a model has the recorded weights in all modules that can be compared, and in at least one."""
    differing, compared = model.differing(recorded, modules)
    return compared > 0 and not differing
