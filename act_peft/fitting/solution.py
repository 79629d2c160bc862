"""The fitted change of one module: what every row gains by it, and its best parts of low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from act_peft.fitting.metric import Metric

# Numbers of a block of rows that are worked on at a time, in float64.
_BLOCK = 1 << 24
# Directions below this share of the strongest are rounding; in float64 they have no exact part.
_NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Solution:
    """The change of one weight.

    Attributes:
        delta: Δ `[R, W]`, in the dtype that was asked for.
        gains: what each row gains, float64 `[R]`, 0 or greater.
        directions: the first left singular vectors u_k of Δ L, `[R, K]`, strongest first, in float32 or wider. The
            best change of rank r is sum over k < r of u_k u_kᵀ Δ.
        strengths: all singular values of Δ L, float64 `[min(R, W)]`, falling; the squares sum up to the gains.
    """

    delta: torch.Tensor
    gains: torch.Tensor
    directions: torch.Tensor
    strengths: torch.Tensor


def solve_rows(
    metric: Metric,
    differences: Callable[[slice], Sequence[torch.Tensor]],
    num_rows: int,
    *,
    max_rank: int,
    dtype: torch.dtype,
) -> Solution:
    """Solve for all rows of a weight, a block at a time.

    Args:
        metric: of the module's inputs.
        differences: gives D_j of some rows, float64 `[r, W]` for each donor.
        num_rows: R.
        max_rank: how many directions are kept; 0 leaves them and the strengths out, which saves half of the time.
        dtype: of the stored change.

    Returns:
        The solution, on the device of the metric.

    Raises:
        ActValueError: the moments cannot be solved with.
    """
    deltas, gains, halves = [], [], []
    width = metric.width
    block = max(_BLOCK // width, 1)
    wide = num_rows > width  # then the directions come from the other side
    other_side = torch.zeros((), dtype=torch.float64)
    for start in range(0, num_rows, block):
        delta, gained = metric.solve(differences(slice(start, min(start + block, num_rows))))
        gains.append(gained)
        if max_rank and wide:
            right = delta @ metric.cholesky()  # [r, W]
            other_side = other_side.to(right.device) + right.T @ right
        elif max_rank:
            halves.append(metric.half(delta))
        deltas.append(delta.to(dtype))
    whole = torch.cat(deltas)
    if not max_rank:
        empty = whole.new_zeros(num_rows, 0)
        return Solution(whole, torch.cat(gains), empty, whole.new_zeros(0, dtype=torch.float64))
    if wide:
        directions, strengths = _directions_of_many(metric, deltas, other_side, max_rank)
    else:
        directions, strengths = _directions_of_few(torch.cat(halves), max_rank)
    return Solution(whole, torch.cat(gains), directions.to(torch.promote_types(dtype, torch.float32)), strengths)


def _directions_of_few(half: torch.Tensor, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From F F^T `[R, R]`."""
    squares, vectors = torch.linalg.eigh(half @ half.T)
    return vectors.flip(1)[:, :max_rank], squares.flip(0).clamp(min=0).sqrt()


def _directions_of_many(
    metric: Metric, deltas: Sequence[torch.Tensor], other_side: torch.Tensor, max_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """From (Δ L)ᵀ Δ L `[W, W]`, whose eigenvectors v_k give u_k = Δ L v_k / s_k."""
    squares, vectors = torch.linalg.eigh(other_side)
    strengths = squares.flip(0).clamp(min=0).sqrt()  # [W]
    exact = strengths[:max_rank] > _NEGLIGIBLE * strengths[0]
    kept = vectors.flip(1)[:, :max_rank][:, exact] / strengths[:max_rank][exact]  # [W, K]
    onto = metric.cholesky() @ kept
    # The blocks have been rounded: made orthonormal, the directions are exact all the same.
    return torch.linalg.qr(torch.cat([delta.double() @ onto for delta in deltas])).Q, strengths
