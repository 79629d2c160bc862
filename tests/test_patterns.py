"""Expressions from files: the answers of `re`, in a time that their author does not choose."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_peft import ActValueError
from act_peft.patterns import KeyPatterns, LinearPattern

LONG = "model.layers.0.self_attn.q_proj" + "a" * 200

atoms = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "1", "[]a]"])
quantifiers = st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}", "{2,}", "{0}"])
expressions = st.recursive(
    st.builds(lambda a, q: a + q, atoms, quantifiers),
    lambda inner: st.one_of(
        st.builds(lambda parts: "".join(parts), st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda a, b, q: f"({a}|{b}){q}", inner, inner, quantifiers),
        st.builds(lambda a: f"^(?:{a})$", inner),
    ),
    max_leaves=6,
)


@given(expressions, st.text("ab.1", max_size=8))
def test_the_answers_are_those_of_re(expression, name):
    try:
        pattern = LinearPattern(expression)
    except ActValueError:  # repetitions of repetitions
        return
    assert pattern.matches(name) == (re.fullmatch(expression, name) is not None)
    suffixes = re.match(rf"(.*\.)?({expression})$", name) is not None  # how PEFT matches a key
    assert pattern.matches(name, suffixes=True) == suffixes


@pytest.mark.parametrize(
    "expression",
    [
        "([a-z_.0-9]+)*X",
        ".*" * 14 + "x!",
        "(a|aa)*" * 20 + "b",
        "((((a*)*)*)*)*b",
        "(a|a)*" * 30 + "!",
        "a?" * 40 + "!",
    ],
)
def test_no_expression_takes_long(expression):
    started = time.process_time()
    assert not LinearPattern(expression).matches(LONG)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("a" * 1001, "it has 1001 characters"),
        ("(a", "a bracket is not closed"),
        ("a)", "a bracket is closed that was not opened"),
        ("(" * 30 + ")" * 30, "more than 20 groups lie within each other"),
        ("(?=a)", "it has a group of a special kind"),
        ("(??a)", "it has a group of a special kind"),
        ("*a", r"'\*' is not known at its place"),
        ("a{3,2}", r"\{3,2\} is no range"),
        (r"(a)\1", r".* is not known at its place"),
        ("(.{1,99}){1,99}", "its repetitions are too many"),
        ("[", "unterminated character set"),
    ],
)
def test_what_is_not_known_is_refused(expression, reason):
    with pytest.raises(ActValueError, match=rf"regular expression .*: {reason}.*, expected characters"):
        LinearPattern(expression)


def test_the_first_key_that_matches_counts():
    keys = KeyPatterns(["layers.1.q_proj", r"^model\.layers\.0\.q_proj$", ".*q_proj", "(k|v)_proj"], most=4)
    assert keys.first("model.layers.1.q_proj") == "layers.1.q_proj"
    assert keys.first("model.layers.0.q_proj") == r"^model\.layers\.0\.q_proj$"
    assert keys.first("model.layers.2.q_proj") == ".*q_proj"
    assert keys.first("model.v_proj") == "(k|v)_proj"
    assert keys.first("model.my_v_proj") is None


def test_too_many_keys_are_refused():
    with pytest.raises(ActValueError, match=r"got 3 regular expressions, expected at most 2"):
        KeyPatterns(["a", "b", "c"], most=2)
    with pytest.raises(ActValueError, match=r"expected at most 100, and few that are not names"):
        KeyPatterns([f".*{n}.{{300}}" for n in range(10)], most=100)
