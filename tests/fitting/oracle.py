"""Fits by brute force: every term of the objective is written out as rows of a least-squares problem, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mean_square(rows: torch.Tensor) -> float:
    """Mean over rows and inputs of x²."""
    return float(rows.double().square().mean())


def with_ones(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows, torch.ones(len(rows), 1, dtype=rows.dtype)), dim=1)


def scales_of(ability: Sequence[torch.Tensor], keep: torch.Tensor | None) -> tuple[float, list[float]]:
    """m, and the factor on each ability's inputs."""
    squares = [mean_square(rows) for rows in ability]
    m = sum(squares) / len(squares) if keep is None else mean_square(keep)
    return m, [m / square for square in squares]


def objective(
    delta: torch.Tensor,
    differences: Sequence[torch.Tensor],
    ability: Sequence[torch.Tensor],
    keep: torch.Tensor | None,
    *,
    keep_weight: float,
    ridge: float,
    prior_scale: float,
) -> torch.Tensor:
    """The objective of every row of the change, `[O]`, token by token."""
    m, scales = scales_of(ability, keep)
    total = torch.zeros(len(delta), dtype=torch.float64)
    for difference, rows, scale in zip(differences, ability, scales, strict=True):
        for x in rows.double():
            total += scale / len(rows) * ((difference - delta) @ x).square()
    for x in [] if keep is None else keep.double():
        total += keep_weight / len(keep) * (delta @ x).square()
    prior = prior_scale * sum(differences) / len(differences)
    return total + ridge * m * (delta - prior).square().sum(1)


def least_squares(
    differences: Sequence[torch.Tensor],
    ability: Sequence[torch.Tensor],
    keep: torch.Tensor | None,
    *,
    keep_weight: float,
    ridge: float,
    prior_scale: float,
) -> torch.Tensor:
    """The change `[O, I]` that minimises the objective."""
    m, scales = scales_of(ability, keep)
    width = ability[0].shape[1]
    design, targets = [], []
    for difference, rows, scale in zip(differences, ability, scales, strict=True):
        factor = (scale / len(rows)) ** 0.5
        design.append(factor * rows.double())
        targets.append(factor * rows.double() @ difference.T)
    if keep is not None:
        design.append((keep_weight / len(keep)) ** 0.5 * keep.double())
        targets.append(torch.zeros(len(keep), len(differences[0]), dtype=torch.float64))
    design.append((ridge * m) ** 0.5 * torch.eye(width, dtype=torch.float64))
    targets.append((ridge * m) ** 0.5 * prior_scale * (sum(differences) / len(differences)).T)
    return torch.linalg.lstsq(torch.cat(design), torch.cat(targets)).solution.T
