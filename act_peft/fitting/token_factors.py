"""The best change of low rank of an embedding, whose every row has a metric of its own.

Row t of the change counts by M_t = S + c_t 1 (see `act_peft.fitting.tokens`), so what a factorization loses is

    sum over t of E_t (S + c_t 1) E_tᵀ,      E = Δ - B A,    B [V, r], A [r, H]

With one metric for all rows the singular value decomposition would give the best factors. Here it gives the start;
then B is solved for given A and A for given B, in turns. Either step has a closed form, and the loss never rises.
"""

from __future__ import annotations

import torch

# Turns after which the loss hardly falls any more.
_TURNS = 8
# Larger changes are factored in float32, which takes half of the memory.
_DOUBLE_NUMBERS = 1 << 24


def token_factors(
    delta: torch.Tensor, metric: torch.Tensor, weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Factor the change of an embedding.

    Args:
        delta: Δ `[V, H]`, any floating dtype.
        metric: S, float64 `[H, H]`, positive definite.
        weights: c_t, float64 `[V]`, 0 or greater.
        rank: r, at most min(V, H) is used.

    Returns:
        B `[V, r]`, A `[r, H]` in float64, or float32 for a large Δ; and what they lose.
    """
    rank = min(rank, *delta.shape)
    if not bool(delta.any()):
        return metric.new_zeros(len(delta), rank), metric.new_zeros(rank, len(metric)), 0.0
    dtype = torch.float64 if delta.numel() <= _DOUBLE_NUMBERS else torch.float32
    values, basis = (part.to(dtype) for part in torch.linalg.eigh(metric))  # Λ [H], Q [H, H]
    inside = delta.to(basis) @ basis  # [V, H], where S is Λ
    weight = weights.to(inside)[:, None]  # [V, 1]
    right = _start(inside, values + weight.mean(), rank)  # [r, H]
    for _ in range(_TURNS):
        left = _left(inside, right, values, weight)
        right = _right(inside, left, values, weight)
        right = torch.linalg.qr(right.T).Q.T  # the same rows' span; B follows
    left = _left(inside, right, values, weight)
    rest = inside - left @ right
    lost = float((rest.square() * (values + weight)).sum())
    return left, right @ basis.T, lost


def _start(inside: torch.Tensor, mean: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal rows `[r, H]`: the best ones if every row of Δ counted by the mean metric."""
    root = mean.sqrt()
    scaled = inside * root  # [V, H]
    vectors = torch.linalg.eigh(scaled.T @ scaled).eigenvectors.flip(1)[:, :rank]  # [H, r]
    return torch.linalg.qr(vectors / root[:, None]).Q.T


def _left(inside: torch.Tensor, right: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The best B for an A with orthonormal rows: (A Λ Aᵀ + c_t 1) b_t = A (Λ + c_t 1) Δ_t, all rows at once."""
    spread, turn = torch.linalg.eigh((right * values) @ right.T)  # [r], [r, r]
    wanted = (inside * values) @ right.T + weight * (inside @ right.T)  # [V, r]
    return (wanted @ turn / (spread + weight)) @ turn.T


def _right(inside: torch.Tensor, left: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The best A for B: (λ_h Bᵀ B + Bᵀ C B) a_h = Bᵀ (λ_h 1 + C) Δ_h for every column h."""
    weighted = left * weight
    # A tiny ridge, so that a B of lower rank can be solved with.
    both = values[:, None, None] * (left.T @ left) + left.T @ weighted  # [H, r, r]
    diagonal = both.diagonal(dim1=1, dim2=2)
    diagonal.add_(10 * torch.finfo(both.dtype).eps * diagonal.amax())
    wanted = values * (left.T @ inside) + weighted.T @ inside  # [r, H]
    return torch.linalg.solve(both, wanted.T[:, :, None])[:, :, 0].T
