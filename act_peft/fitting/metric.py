"""The objective of one module's change, and its solution: the mathematics of a fit, for any weight and inputs.

Rows x are the inputs of a module y = W x, with a 1 appended where it has a bias. D_j = W_donor,j - W_base `[O, W]`,
A_j and K their mean second moments x xᵀ `[W, W]` on the data of ability j and on those to keep, times what each
counts. D̄ is the mean of the D_j, ρ = ε m the ridge. The change Δ is the minimum of

    f(Δ) = sum over j of tr (D_j - Δ) A_j (D_j - Δ)ᵀ  +  tr Δ K Δᵀ  +  ρ |Δ - λ D̄|²         (K includes μ)

    Δ = (sum over j of D_j A_j + ρ λ D̄) M⁻¹,      M = sum over j of A_j + K + ρ 1

M is the Hessian of f, so f(0) - f(Δ) = tr Δ M Δᵀ: row i of Δ L, with L Lᵀ = M, has the square of what row i gains, and
the singular values of Δ L have the squares of what each of its directions gains.

Two forms give the same: with second moments (primal, [W, W]), or with the rows themselves (dual, [N, N]). With X the N
rows, each times the root of its factor, and C = X Xᵀ:

    Δ = λ D̄ + Y (C + ρ 1)⁻¹ X,    column n of Y is (D_j - λ D̄) x_n for a row of ability j, else -λ D̄ x_n
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from act_peft.errors import ActValueError


class Metric(ABC):
    """M of one input, with the A_j of its objective.

    Args:
        name: the module, for messages.
        ridge: ρ = ε m.
        prior_scale: λ.
    """

    def __init__(self, name: str, *, ridge: float, prior_scale: float) -> None:
        self._name = name
        self._ridge = ridge
        self._prior_scale = prior_scale
        self._cholesky: torch.Tensor | None = None

    @property
    def ridge(self) -> float:
        """ρ."""
        return self._ridge

    @property
    def prior_scale(self) -> float:
        """λ."""
        return self._prior_scale

    @property
    @abstractmethod
    def width(self) -> int:
        """W."""

    @abstractmethod
    def solve(self, differences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The change Δ `[R, W]` of R rows, and what each of them gains, f_i(0) - f_i(Δ_i) `[R]`, 0 or greater.

        Args:
            differences: the D_j of these rows, float64 `[R, W]` each.
        """

    @abstractmethod
    def matrix(self) -> torch.Tensor:
        """M, float64 `[W, W]`."""

    @abstractmethod
    def ability_moments(self) -> list[torch.Tensor]:
        """The A_j, float64 `[W, W]` each."""

    @abstractmethod
    def half(self, delta: torch.Tensor) -> torch.Tensor:
        """Some F `[R, *]` with F Fᵀ = Δ M Δᵀ, for Δ `[R, W]`."""

    def cholesky(self) -> torch.Tensor:
        """L, float64 `[W, W]`, lower triangular, with L Lᵀ = M.

        Raises:
            ActValueError: the moments are so unlike in size that the ridge is lost beside them.
        """
        if self._cholesky is None:
            self._cholesky = self._factored(self.matrix())
        return self._cholesky

    def _mean(self, differences: Sequence[torch.Tensor]) -> torch.Tensor:
        return differences[0] if len(differences) == 1 else torch.stack(list(differences)).mean(0)

    def _factored(self, matrix: torch.Tensor) -> torch.Tensor:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise ActValueError(
                f"{self._name}: the second moments of its inputs cannot be solved with, expected a greater ridge (it "
                "is lost in rounding beside the largest inputs)"
            )
        return factor


class PrimalMetric(Metric):
    """From second moments.

    Args:
        name: the module, for messages.
        ability: A_j, float64 `[W, W]` each.
        keep: K, times μ.
        ridge: ρ.
        prior_scale: λ.
    """

    def __init__(
        self, name: str, ability: Sequence[torch.Tensor], keep: torch.Tensor, *, ridge: float, prior_scale: float
    ) -> None:
        super().__init__(name, ridge=ridge, prior_scale=prior_scale)
        self._ability = list(ability)
        self._keep = keep

    @property
    def width(self) -> int:
        """W."""
        return self._keep.shape[0]

    def matrix(self) -> torch.Tensor:
        """M, float64 `[W, W]`."""
        total = self._keep.clone()
        for moments in self._ability:
            total += moments
        total.diagonal().add_(self._ridge)
        return total

    def solve(self, differences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Δ `[R, W]` and gains `[R]`, float64."""
        wanted = self._mean(differences) * (self._ridge * self._prior_scale)  # [R, W]
        for difference, moments in zip(differences, self._ability, strict=True):
            wanted = torch.addmm(wanted, difference, moments)
        delta = torch.cholesky_solve(wanted.T, self.cholesky()).T
        return delta, (delta * wanted).sum(1).clamp(min=0)  # wanted is Δ M

    def ability_moments(self) -> list[torch.Tensor]:
        """The A_j, float64 `[W, W]` each."""
        return list(self._ability)

    def half(self, delta: torch.Tensor) -> torch.Tensor:
        """Δ L `[R, W]`."""
        return delta @ self.cholesky()


class DualMetric(Metric):
    """From the rows themselves.

    Args:
        name: the module, for messages.
        rows: for each ability, and last for the data to keep, float64 `[N, W]`, times the root of what a row counts;
            None where there are none.
        ridge: ρ.
        prior_scale: λ.
    """

    def __init__(self, name: str, rows: Sequence[torch.Tensor | None], *, ridge: float, prior_scale: float) -> None:
        super().__init__(name, ridge=ridge, prior_scale=prior_scale)
        self._sources = list(rows)
        self._rows = torch.cat([part for part in rows if part is not None])  # [N, W]
        kernel = self._rows @ self._rows.T  # [N, N]
        kernel.diagonal().add_(ridge)
        self._kernel = self._factored(kernel)

    @property
    def width(self) -> int:
        """W."""
        return self._rows.shape[1]

    def matrix(self) -> torch.Tensor:
        """M, float64 `[W, W]`."""
        total = self._rows.T @ self._rows
        total.diagonal().add_(self._ridge)
        return total

    def solve(self, differences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Δ `[R, W]` and gains `[R]`, float64."""
        prior = self._mean(differences) * self._prior_scale  # [R, W]
        wanted = []
        for source, rows in enumerate(self._sources):
            if rows is not None:
                is_ability = source < len(differences)
                wanted.append((differences[source] - prior if is_ability else -prior) @ rows.T)
        solved = torch.cholesky_solve(torch.cat(wanted, dim=1).T, self._kernel).T  # [R, N]
        delta = torch.addmm(prior, solved, self._rows)
        return delta, self.half(delta).square().sum(1)

    def ability_moments(self) -> list[torch.Tensor]:
        """The A_j, float64 `[W, W]` each."""
        width = self._rows.shape[1]
        return [self._rows.new_zeros(width, width) if r is None else r.T @ r for r in self._sources[:-1]]

    def half(self, delta: torch.Tensor) -> torch.Tensor:
        """Δ Xᵀ beside √ρ Δ: `[R, N + W]`."""
        return torch.cat((delta @ self._rows.T, delta * self._ridge**0.5), dim=1)
