"""The one answer to the question which tensor of a checkpoint, and which part of it, is a parameter of a model.

Two things stand between a parameter's name and a key. `Layout` knows the first: how the class that the checkpoint
names stores its parameters. The second is here: the model whose names are given may be another one than the
checkpoint's, with or without a head, or the part for text of a multimodal model. Then the text before
`layers.0. ...` differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property

import torch

from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.layout import Layout, Piece, Place
from act_peft.disk.skeleton import check_ties_known, layout_of
from act_peft.disk.sources import TensorSource
from act_peft.errors import ActValueError

_LAYER_NUMBER = re.compile(r"(^|\.)\d+\.")
_NAMED = 4  # candidates that a message names

Change = tuple[str, str]  # a prefix of the names, and what replaces it
Fits = Callable[[str, Sequence[int]], bool]
Recognize = Callable[["CheckpointKeys"], int]


class CheckpointKeys:
    """The tensors of a model's parameters in one checkpoint, or in a different source of tensors.

    Args:
        source: the checkpoint.
        names: parameter names of the model. All of them together decide which part of the checkpoint is meant; a name
            that is not among them may be asked for too.
        fits: whether a shape can be that of a parameter, for choosing between two parts of equal names.
        recognize: how many of the parameters that are known from elsewhere have their known values in a candidate.
        model_types: the types of the model's configurations, for the same choice.

    Raises:
        ActValueError: two parts of the checkpoint fit equally well.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Collection[str],
        *,
        fits: Fits | None = None,
        recognize: Recognize | None = None,
        model_types: Collection[str] = (),
    ) -> None:
        self._source = source
        self._layout = layout_of(source) if isinstance(source, Checkpoint) else None
        self._change: Change = ("", "")
        if not all(name in self._known for name in names):
            self._change = self._choose(names, fits, recognize, model_types)

    @property
    def layout(self) -> Layout | None:
        """The layout of the checkpoint; None where its model is not known."""
        return self._layout

    # --------------------------------------------------------------------------------------------------- places ---

    def own_name(self, parameter: str) -> str:
        """The name that a parameter has in the checkpoint's own model; without such a model, its key."""
        return _renamed(parameter, self._change)

    def parameter(self, own_name: str) -> str | None:
        """The parameter that has a name in the checkpoint's own model; None for one outside the part that is meant."""
        old, new = self._change
        return old + own_name.removeprefix(new) if own_name.startswith(new) else None

    def holds(self, parameter: str) -> bool:
        """Whether the checkpoint has a parameter, as a tensor of its own or tied to one."""
        own = self.own_name(parameter)
        if self._layout is not None:
            return own in self._known
        if own in self._source:
            return True
        if isinstance(self._source, Checkpoint):
            check_ties_known(self._source)
        return False

    def place(self, parameter: str) -> Place | None:
        """Where the values of a parameter lie, its own or those of what it is tied to; None if nowhere.

        Raises:
            ActValueError: they are computed from tensors in a way that moves more than rows; the model of the
                checkpoint is not known, and so are its ties.
        """
        if not self.holds(parameter):
            return None
        own = self.own_name(parameter)
        holder = None if self._layout is None else self._layout.holder(own)
        return Place((Piece(own),)) if self._layout is None or holder is None else self._layout.place(holder)

    def key(self, parameter: str) -> str:
        """A key to name in messages: that of the parameter's tensor, or the one that it should have."""
        own = self.own_name(parameter)
        holder = None if self._layout is None else self._layout.holder(own)
        if self._layout is None or (holder is None and own in self._layout.unread):
            return own
        if holder is None:
            return self._layout.new_key(own)
        return self._layout.keys_of(holder)[0]

    @property
    def surplus(self) -> Collection[str]:
        """Parameters of the checkpoint's own model that have tensors, or all keys where this model is not known.

        What the class ignores while loading (layers for the prediction of several tokens, buffers of old versions) is
        no parameter.
        """
        return self._layout.stored if self._layout is not None and self._layout.read else self._source.names

    # ----------------------------------------------------------------------------------------------------- values ---

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter.

        Raises:
            ActValueError: the checkpoint does not have it.
        """
        own = self.own_name(parameter)
        holder = None if self._layout is None else self._layout.holder(own)
        return self._source.shape(self.key(parameter)) if holder is None else self._layout.shape(holder)  # type: ignore[union-attr]

    def dtype(self, parameter: str) -> torch.dtype:
        """Dtype of a parameter."""
        return self._source.dtype(self.key(parameter))

    def rows(self, parameter: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a parameter; `index` is int64 `[K]`, ascending.

        Raises:
            ActValueError: as `place`; the checkpoint does not have the parameter.
        """
        place = self.place(parameter)
        if place is None:
            return self._source.rows(self.key(parameter), index, dim)  # raises, and says what is missing
        if place.key is not None and place.shape is None:
            return self._source.rows(place.key, index, dim)
        length = self.shape(parameter)[0]
        found = torch.empty(0)
        for piece in place.pieces:
            wanted = torch.arange(length) if dim else index
            channels = torch.arange(length) if piece.channels is None else piece.channels
            rows = torch.arange(length) if piece.rows is None else piece.rows
            into = torch.isin(wanted, channels).nonzero().squeeze(1)  # positions in the result
            from_rows, order = rows[torch.searchsorted(channels, wanted[into])].sort()
            if dim:
                read = self._source.rows(piece.key, index, 1)[from_rows]  # [rows, K]
            else:
                read = self._source.rows(piece.key, from_rows, 0)
            read = read.flatten(1) if len(place.shape or ()) == 2 else read
            if not found.numel():
                found = read.new_empty(len(wanted), *read.shape[1:])
            found[into[order]] = read
        return found

    # -------------------------------------------------------------------------------------------------- choosing ---

    @cached_property
    def _known(self) -> Collection[str]:
        """The names of everything that the checkpoint has."""
        layout = self._layout
        if layout is None:
            return frozenset(self._source.names)
        tied = (name for group in layout.groups for name in group if layout.holder(name) is not None)
        return frozenset([*layout.stored, *tied, *layout.unread])

    def _choose(
        self,
        names: Collection[str],
        fits: Fits | None,
        recognize: Recognize | None,
        model_types: Collection[str],
    ) -> Change:
        """The prefix of the names, and the prefix that replaces it; `("", "")` if none fits better.

        The deepest names suggest the prefixes. If several fit, the one with the most tensors of the model is taken.
        Shapes, known values and the configuration decide between equals.
        """
        found = {change for anchor in _anchors(names) for change in _changes(anchor, self._known)}
        changes = [("", ""), *sorted(found - {("", "")})]
        counts = [self._count(names, change, fits) for change in changes]
        best = [change for change, count in zip(changes, counts, strict=True) if count == max(counts)]
        if best[0] == ("", ""):
            return best[0]
        # Two changes of prefixes may give the same names.
        best = list({tuple(_renamed(name, change) for name in names): change for change in best}.values())
        if len(best) > 1 and recognize is not None:
            best = _greatest(best, [recognize(self._with(change)) for change in best])
        if len(best) > 1 and self._layout is not None:
            best = _greatest(best, [self._layout.model_type(new) in model_types for _, new in best])
        if len(best) > 1:
            first = next(name for name in names if all(_renamed(name, c) in self._known for c in best))
            candidates = [self._with(change).key(first) for change in best]
            more = f" and {len(best) - _NAMED} more" if len(best) > _NAMED else ""
            raise ActValueError(
                f"{self._source.location}: {first} may be {', '.join(candidates[:_NAMED])}{more}, expected a single "
                "one (shapes, recorded fingerprints and configuration are the same; use the checkpoint of the part "
                "that is meant)"
            )
        return best[0]

    def _count(self, names: Collection[str], change: Change, fits: Fits | None) -> tuple[int, int]:
        """How many of the parameters have a tensor of a fitting shape, and how many have one at all."""
        trial = self._with(change)
        there = [name for name in names if _renamed(name, change) in self._known]
        return sum(fits(name, trial.shape(name)) for name in there) if fits is not None else 0, len(there)

    def _with(self, change: Change) -> CheckpointKeys:
        trial = CheckpointKeys(self._source, ())
        trial._change = change
        trial.__dict__["_known"] = self._known
        return trial


def _greatest(changes: Sequence[Change], evidence: Sequence[int]) -> list[Change]:
    return [change for change, count in zip(changes, evidence, strict=True) if count == max(evidence)]


def _anchors(names: Collection[str]) -> Iterator[str]:
    """The deepest name of every part of a model: a multimodal one has several lists of layers."""
    parts: dict[str, str] = {}
    for name in names:
        numbered = _LAYER_NUMBER.search(name)
        part = name[: numbered.start()] if numbered else ""
        parts[part] = max(parts.get(part, ""), name, key=lambda n: (n.count("."), n))
    return iter(parts.values())


def _changes(anchor: str, keys: Collection[str]) -> list[Change]:
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


def _renamed(name: str, change: Change) -> str:
    old, new = change
    return new + name.removeprefix(old) if name.startswith(old) else name


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
