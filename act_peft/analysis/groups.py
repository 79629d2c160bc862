"""Groups of modules: by kind and by layer, from their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum

from act_peft.channels.names import last_part

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


class Grouping(Enum):
    """KIND pools the modules of one name over the layers, LAYER those of one layer."""

    KIND = "kind"
    LAYER = "layer"


def groups_of(names: Iterable[str], grouping: Grouping) -> dict[str, str]:
    """The group of every module.

    Args:
        names: the modules, in the model's order.
        grouping: a kind is the last part of a name (`q_proj`). A layer is the first number in a name; where a model
            has several stacks of layers, with what tells them apart (`encoder 3`). Modules outside the layers are
            their own group.

    Returns:
        Module name -> group.
    """
    names = list(names)
    if grouping is Grouping.KIND:
        return {name: last_part(name) for name in names}
    found = {name: _NUMBER.search(name) for name in names}
    stacks = _stacks({name[: number.start()] for name, number in found.items() if number})
    return {
        name: f"{stacks[name[: number.start()]]} {number[1]}" if number else last_part(name)
        for name, number in found.items()
    }


def _stacks(prefixes: set[str]) -> dict[str, str]:
    """A short name for each list of layers: `layer` for a single one, otherwise the parts in which they differ."""
    if len(prefixes) <= 1:
        return dict.fromkeys(prefixes, "layer")
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    front = _common(list(parts.values()))
    back = _common([list(reversed(found[front:])) for found in parts.values()])
    return {prefix: ".".join(found[front : len(found) - back]) or prefix or "layer" for prefix, found in parts.items()}


def _common(lists: list[list[str]]) -> int:
    """How many items at the beginning all lists share."""
    return next(
        (n for n, items in enumerate(zip(*lists, strict=False)) if len(set(items)) > 1),
        min(map(len, lists), default=0),
    )
