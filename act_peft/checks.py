"""Checks of arguments that repeat: choices, numbers, lists of numbers. One wording, one kind of error per mistake.

A value of the wrong type is an `ActTypeError` (a bool is no number), one of the right type that cannot be used an
`ActValueError`. Numbers of numpy and torch count as numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from enum import Enum
from typing import Any, TypeVar

from act_peft.errors import ActTypeError, ActValueError

MOST = 2**53  # of counts: a float and an int64 hold every integer up to here

Choice = TypeVar("Choice", bound=Enum)


def shown(value: Any) -> str:
    """The beginning of a value's text, for a message. Python refuses to write integers of thousands of digits."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too long to write"


def member_of(choices: type[Choice], value: str | Choice, argument: str) -> Choice:
    """The member of an enum that an argument means.

    Args:
        choices: the enum.
        value: a member or its value.
        argument: name of the argument, for the message.

    Raises:
        ActValueError: it is none of them.
    """
    try:
        return choices(value)
    except ValueError as error:
        allowed = ", ".join(repr(choice.value) for choice in choices)
        raise ActValueError(f"{argument}: got {shown(value)}, expected one of {allowed}") from error


def yes_or_no(value: Any, argument: str) -> bool:
    """A bool.

    Raises:
        ActTypeError: it is none.
    """
    if not isinstance(value, bool):
        raise ActTypeError(f"{argument}: got {value!r:.80}, expected True or False")
    return value


def number(value: Any, argument: str, *, expected: str = "a number") -> float:
    """A number as a float, which may be infinite or NaN.

    Args:
        value: the argument.
        argument: its name, for the message.
        expected: what is expected, for the message.

    Raises:
        ActTypeError: it is no number.
    """
    if not isinstance(value, (bool, str)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except OverflowError:  # an int beyond the range of floats
            return math.inf
        except (TypeError, ValueError, RuntimeError):  # several numbers, such as a tensor
            pass
    raise ActTypeError(f"{argument}: got {shown(value)}, expected {expected}")


def finite_number(
    value: Any,
    argument: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    nonzero: bool = False,
) -> float:
    """A finite number in a range, as a float.

    Args:
        value: the argument.
        argument: its name, for the message.
        above: the number is greater than this.
        least: the number is not smaller than this.
        most: the number is not greater than this.
        nonzero: whether 0 is refused.

    Raises:
        ActTypeError: it is no number.
        ActValueError: it is not finite, or outside the range.
    """
    expected = "a number" if most is not None else "a finite number"
    expected += _range_text(above, least, most) + (" other than 0" if nonzero else "")
    if most == 1:
        expected += " (5% is 0.05)"
    found = number(value, argument, expected=expected)
    if not math.isfinite(found) or not _is_inside(found, above, least, most) or (nonzero and found == 0):
        raise ActValueError(f"{argument}: got {shown(value)}, expected {expected}")
    return found


def whole_number(value: Any, argument: str, *, least: int | None = None, most: int | None = None) -> int:
    """An integer in a range.

    Args:
        value: the argument.
        argument: its name, for the message.
        least: the smallest allowed value.
        most: the greatest allowed value.

    Raises:
        ActTypeError: it is no integer; 2.0 is none.
        ActValueError: it is outside the range.
    """
    expected = "an integer" + _range_text(None, least, None if most == MOST else most)
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise ActTypeError(f"{argument}: got {shown(value)}, expected {expected}")
    if not _is_inside(found, None, least, most):
        raise ActValueError(f"{argument}: got {shown(found)}, expected {expected}")
    return found


def ascending(values: Any, argument: str, **limits: Any) -> list[float]:
    """Different numbers, sorted.

    Args:
        values: the argument, in any order.
        argument: its name, for the message.
        limits: for every number, as in `finite_number`.

    Raises:
        ActTypeError: it is no sequence, or holds something else than numbers.
        ActValueError: it is empty, holds a number twice, or one that is not finite or outside the range.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ActTypeError(f"{argument}: got {values!r:.80}, expected a list of numbers")
    numbers = [finite_number(value, argument, **limits) for value in values]
    if not numbers:
        raise ActValueError(f"{argument}: got none, expected at least one number")
    if len(set(numbers)) < len(numbers):
        raise ActValueError(f"{argument}: got {numbers}, expected each value once")
    return sorted(numbers)


def module_name(name: Any) -> str:
    """The name of a module.

    Raises:
        ActTypeError: it is no string.
    """
    if not isinstance(name, str):
        raise ActTypeError(f"{name!r}: got {type(name).__name__} as a module name, expected a str")
    return name


def _range_text(above: float | None, least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    lower = "" if above is None else f" above {above}"
    if least is not None:
        lower = f" of at least {least}"
    return lower + ("" if most is None else f"{' and' if lower else ' of'} at most {most}")


def _is_inside(value: float, above: float | None, least: float | None, most: float | None) -> bool:
    return (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
