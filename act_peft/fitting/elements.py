"""Norms: every channel is a fit of its own, with one input (or two, where there is a bias)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from act_peft.errors import ActValueError
from act_peft.fitting.moments import weigh
from act_peft.fitting.settings import FitSettings


class ElementMoments:
    """Sums of the normalized inputs n and of their squares, on the data of every donor and on those to keep.

    A norm gives y_i = n_i w_i (+ b_i): for each channel a linear module whose input is n_i, or (n_i, 1).

    Args:
        name: the module, for messages.
        width: number of channels C.
        num_donors: number of abilities J; source J is the data to keep.
        has_bias: whether the module has a bias.

    Attributes:
        num_tokens: rows of every source, J + 1 numbers.
    """

    def __init__(self, name: str, width: int, *, num_donors: int, has_bias: bool) -> None:
        self._name = name
        self._width = width
        self._has_bias = has_bias
        self.num_tokens = [0] * (num_donors + 1)
        self._sums = torch.zeros(num_donors + 1, 2, width, dtype=torch.float64, device="cpu")  # of n, of n²

    def add_(self, source: int, rows: torch.Tensor) -> None:
        """Add normalized inputs `[N, C]`, any floating dtype."""
        # Summed where they are, in float64 where the device has it.
        wide = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        self._sums[source] += torch.stack((wide.sum(0), wide.square().sum(0))).cpu().double()
        self.num_tokens[source] += len(rows)

    def solve(self, differences: Sequence[torch.Tensor], settings: FitSettings) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve every channel by itself; the objective is that of `act_peft.fitting.metric`, summed over channels.

            Δ_i = (sum over j of D_ji a_ji + ε m λ D̄_i) / (sum over j of a_ji + μ k_i + ε m)          without a bias

        Args:
            differences: D_j, float64 `[C, 1]`, or with the bias's `[C, 2]`, for each donor.
            settings: μ, ε and λ.

        Returns:
            Δ, float64 `[C, 1]` or `[C, 2]`, and what each channel gains, float64 `[C]`.

        Raises:
            ActValueError: no data of an ability; inputs that are not finite.
        """
        *ability, keep = self.num_tokens
        if 0 in ability:
            raise ActValueError(
                f"{self._name}: no token of the ability's data reaches it, expected at least one (leave it out with "
                f"exclude_modules=[{self._name!r}])"
            )
        moments = self._moments()  # [J + 1, C, w, w]
        squares = moments.diagonal(dim1=2, dim2=3).mean(dim=(1, 2)).tolist()
        weights = weigh(self._name, squares[:-1], squares[-1] if keep else None, settings.keep_weight)
        ridge = settings.ridge * weights.scale
        metric = weights.keep * moments[-1]  # [C, w, w]
        wanted = torch.stack(list(differences)).mean(0) * (ridge * settings.prior_scale)  # [C, w]
        for difference, weight, part in zip(differences, weights.ability, moments, strict=False):
            metric = metric + weight * part
            wanted = wanted + weight * torch.einsum("cv,cvw->cw", difference, part)
        metric.diagonal(dim1=1, dim2=2).add_(ridge)
        delta = torch.linalg.solve(metric, wanted)
        return delta, torch.einsum("cv,cvw,cw->c", delta, metric, delta).clamp(min=0)

    def _moments(self) -> torch.Tensor:
        """Means of x xᵀ with x = n_i or (n_i, 1), float64 `[J + 1, C, w, w]`."""
        count = torch.tensor(self.num_tokens, dtype=torch.float64).clamp(min=1)[:, None]
        mean, square = self._sums[:, 0] / count, self._sums[:, 1] / count  # [J + 1, C]
        if not self._has_bias:
            return square[..., None, None]
        rows = (torch.stack((square, mean), -1), torch.stack((mean, torch.ones_like(mean)), -1))
        return torch.stack(rows, -2)
