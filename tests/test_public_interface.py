"""The public names and their signatures, as they are written down in `public_interface.txt`.

A change of the interface is a decision: make it, then write the file anew with
`python -m tests.test_public_interface > tests/public_interface.txt`, and say it in the CHANGELOG.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import act_peft
from act_peft import analysis

WRITTEN = Path(__file__).parent / "public_interface.txt"


def interface() -> Iterator[str]:
    """Each public function with its signature, each class with its public members."""
    yield from _names_of(act_peft)
    for line in _names_of(analysis):
        yield line if line.startswith(" ") else f"analysis: {line}"


def _names_of(module: Any) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if not inspect.isclass(value):
            yield name + (_signature(value) if callable(value) else "")
            continue
        bases = ", ".join(base.__name__ for base in value.__bases__)
        yield f"class {name}({bases})"
        own = vars(value)
        if "__init__" in own:
            yield f"    {_signature(own['__init__'], without=value.__base__)}"
        for member, found in sorted(own.items()):
            if member.startswith("_"):
                continue
            if isinstance(found, property):
                yield f"    {member}: property"
            elif callable(found) or isinstance(found, (classmethod, staticmethod)):
                yield f"    {member}{_signature(getattr(value, member))}"


def _signature(function: Any, without: type | None = None) -> str:
    """The signature, without the fields that a dataclass inherits from another library's base."""
    signature = inspect.signature(function)
    inherited = {field.name for field in fields(without)} if without and is_dataclass(without) else set()
    kept = [parameter for name, parameter in signature.parameters.items() if name not in inherited]
    return str(signature.replace(parameters=kept)).replace("'", "")


def test_the_public_interface_is_as_written_down():
    assert list(interface()) == WRITTEN.read_text(encoding="utf-8").splitlines(), (
        "the public interface changed (see the first lines of this file)"
    )


if __name__ == "__main__":
    print("\n".join(interface()))
