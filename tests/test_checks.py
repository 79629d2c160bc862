from __future__ import annotations

from enum import Enum

import pytest

from act_peft import ActValueError
from act_peft.checks import member_of


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def test_a_member_or_its_value():
    assert member_of(Colour, "red", "colour") is Colour.RED
    assert member_of(Colour, Colour.BLUE, "colour") is Colour.BLUE


@pytest.mark.parametrize("value", ["green", None, 3])
def test_anything_else_is_refused(value):
    with pytest.raises(ActValueError, match=f"colour: got {value!r}, expected one of 'red', 'blue'"):
        member_of(Colour, value, "colour")
