"""The one reader of JSON. Text from strangers is refused, or read as exactly one meaning.

Python's own reader also takes NaN, the last of several equal keys, UTF-16 and a byte order mark, which the libraries
that read the same files do not.
"""

from __future__ import annotations

import json
import math
from typing import Any

from act_peft.errors import ActValueError

_BOM = b"\xef\xbb\xbf"
_MAX_DIGITS = 400  # of an integer; reading longer ones takes quadratic time
_MAX_DEPTH = 100  # of lists and objects; Python's reader stops later, but what works on the result may not


def parse_json(content: bytes | str, where: str, *, finite: bool = True) -> dict[str, Any]:
    """The object in a JSON text.

    Args:
        content: the text, or its bytes in UTF-8.
        where: the file, for messages.
        finite: whether numbers must be finite. Configurations of some models hold `Infinity`.

    Raises:
        ActValueError: it is no JSON, no object, holds a key twice or a number that cannot be used, or is nested too
            deep.
    """

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise ValueError(f"got {text[:40]}, expected finite numbers")
        return value

    try:
        if isinstance(content, bytes):
            if content.startswith(_BOM):
                raise ValueError("it begins with a byte order mark, expected plain UTF-8")
            content = content.decode("utf-8")
        value = json.loads(
            content, object_pairs_hook=_object, parse_int=_integer, parse_float=number, parse_constant=number
        )
        _check_depth(value)
        if "\\u" in content:  # an escape can write half of a character, which no file and no terminal takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ActValueError(
            f"{where}: is not JSON ({str(error)[:120]}), expected an object (the file is damaged)"
        ) from error
    if not isinstance(value, dict):
        raise ActValueError(f"{where}: got {str(value)[:80]}, expected an object (the file is damaged)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {key[:40]!r} twice")
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(text)} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
