"""What users may write for several adapters and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from act_peft import ActTypeError, ActValueError
from act_peft.combination.weighting import Weighted, checked_weights, weighted_adapters


def test_names_places_and_factors():
    assert weighted_adapters("x/law/", None) == [Weighted("law", "x/law/", 1.0)]
    assert weighted_adapters(Path("x/law"), 2) == [Weighted("law", "x/law", 2.0)]
    assert weighted_adapters(["z", "org/a"], (0.5, -1)) == [Weighted("z", "z", 0.5), Weighted("a", "org/a", -1.0)]
    assert weighted_adapters({"m": "z", "n": Path("y")}, {"n": 0.25, "m": 4}) == [
        Weighted("m", "z", 4.0),
        Weighted("n", "y", 0.25),
    ]


def test_weights_by_name_come_in_the_order_of_the_names():
    assert checked_weights(["b", "a"], {"a": 1, "b": 2}) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("adapters", "weights", "error", "match"),
    [
        ([], None, ActValueError, "adapters: got none"),
        (3, None, ActTypeError, "adapters: got 3, expected a folder or Hub id, or a list"),
        (["a", 3], None, ActTypeError, "adapters: got"),
        (["a", "b"], [1.0], ActValueError, "weights: got 1, expected one for each of the 2"),
        (["a"], {"b": 1.0}, ActValueError, r"weights: got \['b'\], expected one for each of \['a'\]"),
        (["x/a", "y/a"], {"a": 1.0}, ActValueError, r"expected one for each of \['a', 'a'\]"),
        (["a"], ["1"], ActTypeError, "weights: got '1', expected a finite number"),
        (["a"], [True], ActTypeError, "weights: got True, expected a finite number"),
        (["a"], [float("inf")], ActValueError, "weights: got inf, expected a finite number"),
    ],
)
def test_bad_ones_are_refused(adapters, weights, error, match):
    with pytest.raises(error, match=match):
        weighted_adapters(adapters, weights)
