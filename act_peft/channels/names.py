"""Matching of module names, with the meaning of PEFT's `target_modules`."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator

from act_peft.errors import ActTypeError

Patterns = str | Collection[str] | None


def matches(name: str, patterns: Patterns) -> bool:
    """Whether `patterns` select a module name, as PEFT reads `target_modules` and `exclude_modules`.

    Args:
        name: dotted module path, as in `named_modules()`.
        patterns: a string is a regular expression that must match the whole name; a list, set or tuple holds names
            that match exactly or as a dotted suffix (`"q_proj"` means `"layers.0.self_attn.q_proj"`, never
            `"my_q_proj"`); None matches nothing.

    Raises:
        ActTypeError: `patterns` is something else.
    """
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    if not isinstance(patterns, (list, set, tuple, frozenset)):
        raise ActTypeError(
            f"module names: got {type(patterns).__name__}, expected a regular expression (str) or a list of names "
            "(write [name] for a single one)"
        )
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def matching_key(name: str, keys: Container[str]) -> str | None:
    """The key that selects module `name`: the name itself, else its longest dotted suffix in `keys`, else None."""
    return next((suffix for suffix in suffixes(name) if suffix in keys), None)


def suffixes(name: str) -> Iterator[str]:
    """The name itself and its dotted suffixes, longest first: `a.b.c`, `b.c`, `c`."""
    while name:
        yield name
        name = name.partition(".")[2]


def last_part(name: str) -> str:
    """The kind of a module as its name says it: `down_proj` of `layers.3.mlp.down_proj`."""
    return name.rpartition(".")[2]
