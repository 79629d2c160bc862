"""Arguments that are one of a few: an enum's member, or its value as a string."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from act_peft.errors import ActValueError

Choice = TypeVar("Choice", bound=Enum)


def member_of(choices: type[Choice], value: str | Choice, argument: str) -> Choice:
    """The member that an argument means.

    Args:
        choices: the closed choice.
        value: a member or its value.
        argument: name of the argument, for the message.

    Raises:
        ActValueError: it is none of them.
    """
    try:
        return choices(value)
    except ValueError as error:
        allowed = ", ".join(repr(choice.value) for choice in choices)
        raise ActValueError(f"{argument}: got {value!r}, expected one of {allowed}") from error
