from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act_peft.disk.json_text import parse_json
from act_peft.errors import ActValueError

REFUSED = {
    "nothing": (b"", "Expecting value"),
    "half": (b'{"a": ', "Expecting value"),
    "a list": (b"[1]", r"got \[1\], expected an object"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "it begins with a byte order mark, expected plain UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "codec can't decode"),
    "a key twice": (b'{"b": {"a": 1, "a": 2}}', "it has the key 'a' twice"),
    "NaN": (b'{"a": NaN}', "got NaN, expected finite numbers"),
    "infinity": (b'{"a": [-Infinity]}', "got -Infinity, expected finite numbers"),
    "a large exponent": (b'{"a": 1e999}', "got 1e999, expected finite numbers"),
    "a long integer": (b'{"a": 1' + b"0" * 500 + b"}", "it has an integer of 501 digits"),
    "nested": (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "it is nested more than 100 deep"),
    "nested without end": (b'{"a":' * 99999, "recursion|Expecting|deep"),
    "half of a character": (b'{"a": "\\ud800"}', "surrogates not allowed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_more_than_one_meaning_is_refused(what):
    content, match = REFUSED[what]
    with pytest.raises(ActValueError, match=f"^f: .*({match})"):
        parse_json(content, "f")


def test_configurations_of_models_may_hold_infinity():
    assert parse_json('{"time_step_limit": [0.0, Infinity]}', "f", finite=False) == {
        "time_step_limit": [0.0, float("inf")]
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.dictionaries(st.text(), values, max_size=4), st.booleans())
def test_every_other_object_is_read_as_python_reads_it(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text.encode(), "f") == json.loads(text) == value
