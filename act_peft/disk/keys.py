"""The one answer to the question under which key a parameter of a model lies in a checkpoint.

Checkpoints of one architecture differ in the text before `layers.0. ...`: nothing (a base model without a head),
`model.` (with a head), `model.language_model.` or `language_model.model.` (inside a multimodal model). Of two tied
parameters often one is stored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.skeleton import tied_weights
from act_peft.disk.sources import TensorSource

_LAYER_NUMBER = re.compile(r"(^|\.)\d+\.")
_TEXT = re.compile("language|text|decoder|model")  # names that wrappers give to the part for text


class CheckpointKeys:
    """The keys of a model's parameters in one checkpoint, or in a different source of tensors.

    Args:
        source: the checkpoint.
        names: parameter names of the model. All of them together decide which prefix of the keys is meant; a name that
            is not among them may be asked for too.
        tied: parameter -> the parameter whose tensor it uses. By default the configuration of the checkpoint is asked.
    """

    def __init__(self, source: TensorSource, names: Collection[str], *, tied: Mapping[str, str] | None = None) -> None:
        self._source = source
        self._names = names
        self._given_ties = tied

    def key(self, parameter: str) -> str | None:
        """The key of the tensor that holds a parameter; None if the checkpoint has no such tensor."""
        own = self.own_key(parameter)
        if own in self._source:
            return own
        partners = (name for pair in self._tied.items() if parameter in pair for name in pair)
        return next((key for key in map(self.own_key, partners) if key in self._source), None)

    def own_key(self, parameter: str) -> str:
        """The key that belongs to a parameter's name, whether the checkpoint has it or not."""
        return _renamed(parameter, self._change)

    def parameter(self, key: str) -> str | None:
        """The parameter name that belongs to a key; None for a key outside the model."""
        old, new = self._change
        return old + key.removeprefix(new) if key.startswith(new) else None

    def untied_by(self, changed: Collection[str]) -> dict[str, str]:
        """The tied parameters that need a tensor of their own when some parameters get new values.

        Args:
            changed: names of the parameters.

        Returns:
            Key of the new tensor -> key of the stored tensor that it starts as.
        """
        new = {}
        for pair in self._tied.items():
            stored = [key for key in map(self.own_key, pair) if key in self._source]
            missing = [key for key in map(self.own_key, pair) if key not in self._source]
            if len(stored) == len(missing) == 1 and not set(pair).isdisjoint(changed):
                new[missing[0]] = stored[0]
        return new

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        if self._given_ties is not None:
            return self._given_ties
        return tied_weights(self._source) if isinstance(self._source, Checkpoint) else {}

    @cached_property
    def _change(self) -> tuple[str, str]:
        if all(name in self._source for name in self._names):
            return "", ""
        return _prefix_change(dict.fromkeys([*self._names, *self._tied, *self._tied.values()]), self._source.names)


def _prefix_change(names: Collection[str], keys: Collection[str]) -> tuple[str, str]:
    """The prefix of the names, and the prefix of the keys that replaces it; `("", "")` if none fits better.

    The deepest names suggest the prefixes. If several fit, the one with the most tensors of the model is taken.
    """
    known = set(keys)
    changes = {change for anchor in _anchors(names) for change in _changes(anchor, known)}
    return max(
        [("", ""), *sorted(changes)],
        key=lambda change: (
            sum(_renamed(name, change) in known for name in names),
            change == ("", ""),
            bool(_TEXT.search(change[1])),
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
    """Prefix changes that make a key out of a name; only those that remove the fewest parts of the name."""
    tail = anchor
    while tail:
        old = anchor[: len(anchor) - len(tail)]
        found = [(old, key[: len(key) - len(tail)]) for key in keys if key != anchor and _is_suffix(tail, key)]
        if found:
            return found
        tail = tail.partition(".")[2]
        if "." not in tail or (_LAYER_NUMBER.search(anchor) and not _LAYER_NUMBER.search(tail)):
            break  # without the module's name or the layer's number any tensor would fit
    return []


def _renamed(name: str, change: tuple[str, str]) -> str:
    old, new = change
    return new + name.removeprefix(old) if name.startswith(old) else name


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
