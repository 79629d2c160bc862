"""Conflicts: channels that several adapters change, and the share of their deltas that cancels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from act_peft.combination.rules import WeightedRows
from act_peft.tables import aligned


@dataclass(frozen=True)
class Conflict:
    """The deltas of two adapters on their shared channels, in one module or over all.

    a and b are the weighted deltas of the shared channels (rows and bias elements together), as long vectors:

        cosine    = a·b / (|a|₂ |b|₂)
        cancelled = 1 - |a + b|₁ / (|a|₁ + |b|₁)

    `cancelled` is the share of the deltas that is lost in the sum: 0 if all signs agree, 1 if b = -a.

    Attributes:
        module: name of the module; None for the total of all modules.
        adapters: names of the two adapters.
        channels: number of channels of each.
        shared: number of shared channels.
        dot: a·b.
        squares: |a|₂², |b|₂².
        moved: |a|₁ + |b|₁.
        remaining: |a + b|₁.
    """

    module: str | None
    adapters: tuple[str, str]
    channels: tuple[int, int]
    shared: int
    dot: float
    squares: tuple[float, float]
    moved: float
    remaining: float

    @property
    def cosine(self) -> float | None:
        """Cosine of the two deltas on the shared channels, in [-1, 1]; None if one of them is zero there."""
        length = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return max(-1.0, min(1.0, self.dot / length)) if length else None

    @property
    def cancelled(self) -> float | None:
        """Share of the deltas that cancels in the sum, in [0, 1]; None if all deltas are zero."""
        return max(0.0, 1.0 - self.remaining / self.moved) if self.moved else None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "adapters": list(self.adapters),
            "channels": list(self.channels),
            "shared": self.shared,
            "cosine": self.cosine,
            "cancelled": self.cancelled,
        }


@dataclass(frozen=True)
class ConflictReport:
    """The conflicts of several adapters, for every pair; `str(report)` is a table.

    Attributes:
        conflicts: one for each pair and each module with shared channels, in the order of the modules.
        totals: one for each pair, over all modules.
    """

    conflicts: tuple[Conflict, ...]
    totals: tuple[Conflict, ...]

    def only_totals(self) -> ConflictReport:
        """The same report with the totals only."""
        return ConflictReport((), self.totals)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `modules`, a list for each module, and `totals`."""
        modules: dict[str, list[dict[str, Any]]] = {}
        for conflict in self.conflicts:
            modules.setdefault(str(conflict.module), []).append(conflict.to_dict())
        return {"modules": modules, "totals": [total.to_dict() for total in self.totals]}

    def __str__(self) -> str:
        lines = [("module", "adapters", "shared", "cosine", "cancelled"), *map(_cells, self.conflicts)]
        lines += [_cells(total) for total in self.totals]
        return "\n".join(aligned(lines, left=(0, 1)))


def _cells(conflict: Conflict) -> tuple[str, ...]:
    small = min(conflict.channels)
    return (
        "all modules" if conflict.module is None else conflict.module,
        " × ".join(conflict.adapters),
        f"{conflict.shared} of {small}",
        "-" if conflict.cosine is None else f"{conflict.cosine:+.3f}",
        "-" if conflict.cancelled is None else f"{conflict.cancelled:.1%}",
    )


class Conflicts:
    """Running sums over modules; `report` at the end.

    Args:
        adapters: their names.
    """

    def __init__(self, adapters: Sequence[str]) -> None:
        self._adapters = list(adapters)
        self._found: list[Conflict] = []
        self._totals = {
            (i, j): Conflict(None, (adapters[i], adapters[j]), (0, 0), 0, 0.0, (0.0, 0.0), 0.0, 0.0)
            for i, j in combinations(range(len(adapters)), 2)
        }

    def add_(self, module: str, parts: Sequence[WeightedRows | None]) -> None:
        """Count one module.

        Args:
            module: its name.
            parts: the rows of each adapter, in the order of `adapters`; None for an adapter that does not change it.
        """
        for (i, j), total in self._totals.items():
            found = _compare(module, total.adapters, parts[i], parts[j])
            self._totals[i, j] = _added(total, found)
            if found.shared:
                self._found.append(found)

    def report(self) -> ConflictReport:
        """The conflicts of all modules so far."""
        return ConflictReport(tuple(self._found), tuple(self._totals.values()))


def _compare(
    module: str, adapters: tuple[str, str], first: WeightedRows | None, second: WeightedRows | None
) -> Conflict:
    counts = tuple(0 if part is None else part.index.numel() for part in (first, second))
    channels = (counts[0], counts[1])
    if first is None or second is None:
        return Conflict(module, adapters, channels, 0, 0.0, (0.0, 0.0), 0.0, 0.0)
    a, b = _shared_rows(first, second), _shared_rows(second, first)
    dot = moved = remaining = square_a = square_b = 0.0
    for x, y in zip(_in_double(a, first.weight), _in_double(b, second.weight), strict=True):
        dot += float((x * y).sum())
        square_a += float(x.square().sum())
        square_b += float(y.square().sum())
        moved += float(x.abs().sum() + y.abs().sum())
        remaining += float((x + y).abs().sum())
    return Conflict(module, adapters, channels, len(a), dot, (square_a, square_b), moved, remaining)


def _shared_rows(adapter: WeightedRows, partner: WeightedRows) -> torch.Tensor:
    return adapter.rows[torch.isin(adapter.index, partner.index)]  # [S, I]


_PIECE = 1024  # rows in float64 at the same time


def _in_double(rows: torch.Tensor, weight: float) -> Iterator[torch.Tensor]:
    return (piece.double() * weight for piece in rows.split(_PIECE))


def _added(a: Conflict, b: Conflict) -> Conflict:
    return Conflict(
        module=a.module,
        adapters=a.adapters,
        channels=(a.channels[0] + b.channels[0], a.channels[1] + b.channels[1]),
        shared=a.shared + b.shared,
        dot=a.dot + b.dot,
        squares=(a.squares[0] + b.squares[0], a.squares[1] + b.squares[1]),
        moved=a.moved + b.moved,
        remaining=a.remaining + b.remaining,
    )
