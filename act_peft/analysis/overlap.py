"""Overlap of two masks, and what chance gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_peft.analysis.marks import mark
from act_peft.analysis.tables import Table, percent
from act_peft.channels.masks import ChannelMask
from act_peft.checks import whole_number

PERMUTATIONS = 999


@dataclass(frozen=True)
class Overlap(Table):
    """What two masks share; `print` shows it.

    Attributes:
        first: number of channels of the first mask.
        second: number of channels of the second mask.
        shared: number of channels in both.
        expected: number of shared channels of two random masks with as many channels of every module, on average.
        z: by how many standard deviations of such random masks `shared` is above `expected`; None if they cannot vary.
        p_value: how often random masks share at least as much, see `compare_masks`.
        permutations: number of random pairs of masks.
        seed: seed of the random masks.
    """

    first: int
    second: int
    shared: int
    expected: float
    z: float | None
    p_value: float
    permutations: int
    seed: int

    @property
    def jaccard(self) -> float:
        """Shared channels / channels in either mask, from 0 to 1; 1 for two empty masks."""
        return _jaccard(self.shared, self.first, self.second)

    @property
    def chance(self) -> float:
        """The same for `expected` shared channels."""
        return _jaccard(self.expected, self.first, self.second)

    @property
    def containment(self) -> tuple[float, float]:
        """Shared channels as a share of the first mask, and of the second; 1 for an empty mask."""
        return tuple(self.shared / count if count else 1.0 for count in (self.first, self.second))  # type: ignore[return-value]

    @property
    def title(self) -> str:
        """What was found, in one line."""
        more = "more than" if self.p_value <= 0.05 else "no more than"
        return f"the masks share {percent(self.jaccard)} of their channels, {more} chance ({percent(self.chance)})"

    def records(self) -> list[dict[str, Any]]:
        """A single row."""
        return [
            {
                "first": self.first,
                "second": self.second,
                "shared": self.shared,
                "expected": self.expected,
                "jaccard": self.jaccard,
                "chance": self.chance,
                "of first": self.containment[0],
                "of second": self.containment[1],
                "z": self.z,
                "p": self.p_value,
            }
        ]


def compare_masks(
    first: ChannelMask, second: ChannelMask, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> Overlap:
    """Count what two masks share, and how often chance shares as much.

    Chance keeps the number of channels that each mask has in every module and permutes the channels within the
    modules. What two such masks share in a module of C channels is hypergeometric, with mean k_a k_b / C, so it is
    drawn from this distribution directly. The p-value is (1 + number of draws with at least as many shared channels)
    / (1 + draws): never too small, and for masks of few channels, where draws are often equal, somewhat large.

    Args:
        first: a mask.
        second: a mask of the same model; modules that only one of them covers count as not selected in the other.
        permutations: number of draws, at least 1.
        seed: seed of the draws.

    Raises:
        ActTypeError: no masks; numbers that are no integers.
        ActValueError: masks that disagree on a module's number of channels; `permutations` below 1, `seed` below 0.

    Example:
        >>> from act_peft.analysis import compare_masks
        >>> same = compare_masks(mask, mask)
        >>> same.jaccard, same.p_value
        (1.0, 0.001)
    """
    permutations = whole_number(permutations, "permutations", least=1)
    seed = whole_number(seed, "seed", least=0)
    marks = mark({"first": first, "second": second})
    a, b = marks.selected.numpy()
    size = marks.sizes.numpy()
    shared = int((marks.marked[0] & marks.marked[1]).sum())
    drawn = np.zeros(permutations, dtype=np.int64)
    random = np.random.default_rng(seed)
    for few, many, count in zip(np.minimum(a, b), np.maximum(a, b), size, strict=True):
        if few:
            drawn += random.hypergeometric(many, count - many, few, size=permutations)
    expected = float((a / size) @ b)
    # Modules of one channel do not vary; the divisor is 1 there only to stay away from 0.
    variance = float((b * (a / size) * (1 - a / size) * (size - b) / np.maximum(size - 1, 1)).sum())
    return Overlap(
        first=int(a.sum()),
        second=int(b.sum()),
        shared=shared,
        expected=expected,
        z=(shared - expected) / math.sqrt(variance) if variance > 0 else None,
        p_value=(1 + int((drawn >= shared).sum())) / (1 + permutations),
        permutations=permutations,
        seed=seed,
    )


def _jaccard(shared: float, first: int, second: int) -> float:
    union = first + second - shared
    return shared / union if union else 1.0
