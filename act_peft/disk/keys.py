"""Under which key a parameter of a model lies in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_LAYER_NUMBER = re.compile(r"(^|\.)\d+\.")


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def prefix_change(names: Collection[str], keys: Collection[str]) -> tuple[str, str]:
    """How the parameter names of a model become the keys of a checkpoint: which prefix is replaced by which.

    Checkpoints of one architecture differ in what stands before `layers.0. ...`: nothing (a base model without head),
    `model.` (with head), `model.language_model.` or `language_model.model.` (inside a multimodal model). The deepest
    names decide; if several places of a checkpoint hold tensors of these names, the one that holds most of the model.

    Args:
        names: parameter names of the model.
        keys: keys of the checkpoint.

    Returns:
        `(old, new)` for `key_for`; `("", "")` if nothing has to change or nothing fits.
    """
    known = set(keys)
    if all(name in known for name in names):
        return "", ""
    changes = {change for anchor in _anchors(names) for change in _changes(anchor, known)}
    text = re.compile("language|text|decoder|model")  # what wrappers call the part that reads text
    return max(
        [("", ""), *sorted(changes)],
        key=lambda change: (
            sum(key_for(name, change) in known for name in names),
            change == ("", ""),
            bool(text.search(change[1])),
        ),
    )


def _anchors(names: Collection[str]) -> Iterator[str]:
    """The deepest name of every part of a model: a multimodal one has several lists of layers."""
    parts: dict[str, str] = {}
    for name in names:
        numbered = _LAYER_NUMBER.search(name)
        part = name[: numbered.start()] if numbered else ""
        parts[part] = max(parts.get(part, ""), name, key=lambda n: (n.count("."), n))
    return iter(parts.values())


def _changes(anchor: str, keys: Collection[str]) -> list[tuple[str, str]]:
    """Prefix changes under which a name becomes a key; those that take the fewest parts of the name away."""
    tail = anchor
    while tail:
        old = anchor[: len(anchor) - len(tail)]
        found = [(old, key[: len(key) - len(tail)]) for key in keys if key != anchor and _is_suffix(tail, key)]
        if found:
            return found
        tail = tail.partition(".")[2]
        if "." not in tail or (_LAYER_NUMBER.search(anchor) and not _LAYER_NUMBER.search(tail)):
            break  # without the module's name or the layer's number any tensor would do
    return []


def key_for(name: str, change: tuple[str, str]) -> str:
    """The checkpoint's key of a parameter name, by the result of `prefix_change`."""
    old, new = change
    return new + name.removeprefix(old) if name.startswith(old) else name
