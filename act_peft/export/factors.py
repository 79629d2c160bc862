"""Two factors of the rows of a delta, and what a lower rank would lose.

    delta W = B A,    A [r, I],    B [O, r]

With K <= I rows the exact factors are the rows and a one-hot matrix, with more rows than inputs the rows and the unit
matrix. So the rank is never greater than min(K, I), and the product has the bits of the delta.
"""

from __future__ import annotations

import torch

from act_peft.channels.rows import wide_dtype


def factor_rank(count: int, width: int, max_rank: int | None) -> int:
    """Rank of the factors of K = `count` rows with I = `width` inputs."""
    return min(count, width) if max_rank is None else min(count, width, max_rank)


def factors(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of a delta's rows: exact ones if `rank` allows it, otherwise the best ones of this rank.

    Args:
        rows: `[K, I]`, finite.
        rank: r, at most min(K, I).

    Returns:
        `left` `[K, r]` and `right` `[r, I]` in the dtype of `rows`.
    """
    count, width = rows.shape
    if rank == count:
        return torch.eye(count, dtype=rows.dtype), rows
    if rank == width:
        return rows, torch.eye(width, dtype=rows.dtype)
    u, s, vh = torch.linalg.svd(rows.to(wide_dtype(rows.dtype)), full_matrices=False)
    return u[:, :rank].to(rows.dtype), (s[:rank, None] * vh[:rank]).to(rows.dtype)


def lost_squares(rows: torch.Tensor) -> torch.Tensor:
    """What every rank loses: element r is the least |rows - B A|² for factors of rank r, float64 `[min(K, I) + 1]`."""
    wide = rows.double()
    gram = wide @ wide.T if len(rows) <= rows.shape[1] else wide.T @ wide
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)  # ascending
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


class Losses:
    """Sums of `lost_squares` over the modules of an adapter."""

    def __init__(self) -> None:
        self._total = torch.zeros(1, dtype=torch.float64)

    def add_(self, lost: torch.Tensor) -> None:
        """Add those of a module."""
        length = max(len(self._total), len(lost))
        self._total = torch.stack(
            [torch.nn.functional.pad(one, (0, length - len(one))) for one in (self._total, lost)]
        )
        self._total = self._total.sum(0)

    def rank_for(self, error: float) -> int:
        """The lowest rank with which |delta - B A| is at most this share of |delta|, over all modules; at least 1."""
        within = self._total <= error**2 * self._total[0]
        return max(1, int(within.nonzero()[0]))
