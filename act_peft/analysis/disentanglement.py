"""Disentanglement: whether different abilities sit in different channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from act_peft.analysis.marks import mark
from act_peft.analysis.tables import Table, percent
from act_peft.channels.masks import ChannelMask
from act_peft.errors import ActValueError


@dataclass(frozen=True)
class Disentanglement(Table):
    """What the masks of several abilities, domains or languages share; `print` shows the matrix.

    Attributes:
        names: names of the n masks.
        sizes: number of channels of each.
        jaccard: Jaccard overlap of each pair, n rows of n.
        chance: the same for random masks with as many channels of every module.
        unique: share of each mask that no other mask has.
        unique_by_chance: the same for such random masks.
        common: number of channels that all masks have.
        union: number of channels that at least one mask has.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    jaccard: tuple[tuple[float, ...], ...]
    chance: tuple[tuple[float, ...], ...]
    unique: tuple[float, ...]
    unique_by_chance: tuple[float, ...]
    common: int
    union: int

    @property
    def mean_jaccard(self) -> float:
        """Mean over the pairs of different masks."""
        return _mean_of_pairs(self.jaccard)

    @property
    def mean_chance(self) -> float:
        """The same for random masks."""
        return _mean_of_pairs(self.chance)

    @property
    def title(self) -> str:
        """What was found, in one line."""
        unique = sum(self.unique) / len(self.unique)
        return (
            f"{len(self.names)} masks overlap by {percent(self.mean_jaccard)} on average (chance "
            f"{percent(self.mean_chance)}); {percent(unique)} of a mask is its own"
        )

    def records(self) -> list[dict[str, Any]]:
        """One row for each mask: its overlaps, and the share of it that no other mask has."""
        return [
            {
                "mask": name,
                "channels": self.sizes[row],
                **dict(zip(self.names, self.jaccard[row], strict=True)),
                "its own": self.unique[row],
                "by chance": self.unique_by_chance[row],
            }
            for row, name in enumerate(self.names)
        ]


def measure_disentanglement(masks: Mapping[str, ChannelMask]) -> Disentanglement:
    """Compare the masks of several abilities, domains or languages.

    Our definition, because the paper's is not public: abilities are disentangled as far as their masks share no more
    than chance gives, and as far as a mask has channels that no other mask has. Chance keeps the number of channels
    that every mask has in every module.

    Args:
        masks: name -> mask of the same model, at least two.

    Raises:
        ActTypeError: no dict of masks.
        ActValueError: fewer than two, or masks that disagree on a module's number of channels.

    Example:
        >>> from act_peft.analysis import measure_disentanglement
        >>> counts = {"up": 4}
        >>> masks = {"de": ChannelMask({"up": [0, 1]}, counts), "es": ChannelMask({"up": [1, 2]}, counts)}
        >>> measure_disentanglement(masks).unique
        (0.5, 0.5)
    """
    marks = mark(masks)
    if len(marks.names) < 2:
        raise ActValueError("masks: got 1, expected at least two to compare")
    times = marks.marked.sum(0)  # [C]: by how many masks a channel is selected
    counts = marks.counts
    alone = (marks.marked & (times == 1)).sum(1).double()
    missing = 1 - marks.selected.double() / marks.sizes  # [n, M]: that a random channel of a module is not in a mask
    own = [
        float((marks.selected[row] * _product_of_others(missing, row)).sum()) / float(count) if count else 0.0
        for row, count in enumerate(counts)
    ]
    return Disentanglement(
        names=marks.names,
        sizes=tuple(int(count) for count in counts),
        jaccard=_rows(marks.jaccard(marks.shared())),
        chance=_rows(marks.jaccard(marks.shared_by_chance())),
        unique=tuple((alone / counts.clamp_min(1)).tolist()),
        unique_by_chance=tuple(own),
        common=int((times == len(marks.names)).sum()),
        union=int((times > 0).sum()),
    )


def _product_of_others(values: Any, row: int) -> Any:
    others = [number for number in range(len(values)) if number != row]
    return values[others].prod(0)


def _rows(matrix: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


def _mean_of_pairs(matrix: tuple[tuple[float, ...], ...]) -> float:
    found = [value for a, row in enumerate(matrix) for b, value in enumerate(row) if a < b]
    return sum(found) / len(found)
