from __future__ import annotations

import pytest

from act_peft.errors import ActTypeError, ActValueError
from act_peft.fitting.settings import FitSettings


def test_integers_become_floats() -> None:
    settings = FitSettings(keep_weight=2, ridge=1, prior_scale=-1)
    assert (settings.keep_weight, settings.ridge, settings.prior_scale) == (2.0, 1.0, -1.0)
    assert all(type(value) is float for value in (settings.keep_weight, settings.ridge, settings.prior_scale))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keep_weight", -0.1, "keep_weight: got -0.1, expected a finite number of at least 0"),
        ("keep_weight", float("inf"), "keep_weight: got inf, expected a finite number"),
        ("ridge", 0, "ridge: got 0, expected a finite number above 0"),
        ("ridge", float("nan"), "ridge: got nan, expected a finite number"),
        ("prior_scale", float("nan"), "prior_scale: got nan"),
    ],
)
def test_values_out_of_range(name: str, value: float, message: str) -> None:
    with pytest.raises(ActValueError, match=message):
        FitSettings(**{name: value})


@pytest.mark.parametrize("value", ["1", None, True])
def test_no_numbers(value: object) -> None:
    with pytest.raises(ActTypeError, match=r"ridge: got .*, expected a finite number"):
        FitSettings(ridge=value)  # type: ignore[arg-type]
