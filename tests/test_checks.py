from __future__ import annotations

import math
from enum import Enum

import numpy as np
import pytest
import torch

from act_peft import ActTypeError, ActValueError
from act_peft.checks import ascending, finite_number, member_of, module_name, number, whole_number


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


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_all_libraries_are_numbers(value):
    assert finite_number(value, "x") == 0.5
    assert type(finite_number(value, "x")) is float


@pytest.mark.parametrize("value", [3, np.int32(3), torch.tensor(3)])
def test_integers_of_all_libraries_are_integers(value):
    assert whole_number(value, "x") == 3
    assert type(whole_number(value, "x")) is int


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j, torch.ones(2)])
def test_the_wrong_type_is_a_type_error(value):
    for check in (number, finite_number, whole_number):
        with pytest.raises(ActTypeError, match=r"^x: got .*, expected an? "):
            check(value, "x")
    with pytest.raises(ActTypeError, match=r"^x: got .*, expected a finite number"):
        ascending([1, value], "x")


def test_a_float_is_no_integer():
    with pytest.raises(ActTypeError, match=r"^x: got 2.0, expected an integer from 1 to 3$"):
        whole_number(2.0, "x", least=1, most=3)


def test_a_number_may_be_infinite():
    assert number(-math.inf, "x") == -math.inf
    assert number(10**400, "x") == math.inf


@pytest.mark.parametrize(
    ("value", "limits", "expected"),
    [
        (math.nan, {}, "a finite number"),
        (10**400, {}, "a finite number"),
        (0, {"above": 0}, "a finite number above 0"),
        (-1, {"least": 0}, "a finite number of at least 0"),
        (1.1, {"least": 0, "most": 1}, r"a number from 0 to 1 \(5% is 0.05\)"),
        (0, {"above": 0, "most": 1}, r"a number above 0 and at most 1 \(5% is 0.05\)"),
        (3, {"most": 2}, "a number of at most 2"),
        (0.0, {"nonzero": True}, "a finite number other than 0"),
    ],
)
def test_a_number_outside_the_range_is_a_value_error(value, limits, expected):
    with pytest.raises(ActValueError, match=f"^x: got {value!r:.80}, expected {expected}$"):
        finite_number(value, "x", **limits)


def test_the_ends_of_a_range_are_in_it_except_above():
    assert finite_number(0, "x", least=0, most=1) == 0
    assert finite_number(1, "x", above=0, most=1) == 1
    assert whole_number(1, "x", least=1, most=1) == 1
    with pytest.raises(ActValueError, match=r"^x: got 2, expected an integer of at most 1$"):
        whole_number(2, "x", most=1)


def test_ascending_sorts():
    assert ascending((0.4, 0.1, 0.2), "x", above=0, most=1) == [0.1, 0.2, 0.4]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ("12", ActTypeError, "x: got '12', expected a list of numbers"),
        (0.5, ActTypeError, "x: got 0.5, expected a list of numbers"),
        ([], ActValueError, "x: got none, expected at least one number"),
        ([0.1, 0.1], ActValueError, r"x: got \[0.1, 0.1\], expected each value once"),
        ([0.1, 2], ActValueError, "x: got 2, expected a number above 0 and at most 1"),
    ],
)
def test_what_ascending_refuses(values, error, message):
    with pytest.raises(error, match=message):
        ascending(values, "x", above=0, most=1)


def test_names_of_modules():
    assert module_name("lm_head") == "lm_head"
    with pytest.raises(ActTypeError, match=r"^3: got int as a module name, expected a str$"):
        module_name(3)
