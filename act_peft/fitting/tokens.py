"""Token embeddings: inputs are one-hot, so every token's row is a fit of its own; tied to an output layer or not.

With a_jt the share of token t among the inputs on the data of ability j, k_t that on the data to keep (times μ) and
c_t = sum over j of a_jt + k_t, an embedding alone moves by

    Δ_t = (sum over j of a_jt D_jt + ρ λ D̄_t) / (c_t + ρ),      ρ = ε m, m = 1 / V, the mean of the k_t

An output layer that shares the weight reads hidden states h with second moments A_j and K (times μ). Both uses stand
in one objective: that of the output layer, plus w times that of the embedding.

    Δ_t = (sum over j of D_jt (A_j + w a_jt 1) + ρ λ D̄_t) (S + w c_t 1)⁻¹,    S = sum over j of A_j + K + ρ 1, ρ = ε m

S is decomposed once, S = Q Λ Qᵀ, then row t is divided by Λ + w c_t in the basis Q. The two objectives have different
units. w = m V brings the one-hot inputs, whose mean square is 1 / V, to the mean square m of the hidden states: the
scaling that every ability's inputs get. The embedding's part then weighs as much as the output layer's on the whole,
gathered on the tokens that occur; `tied_weight` multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from act_peft.errors import ActValueError
from act_peft.fitting.metric import Metric
from act_peft.fitting.settings import FitSettings

_BLOCK = 1 << 19


@dataclass(frozen=True)
class TokenSolution:
    """The change of an embedding.

    Attributes:
        delta: Δ `[V, H]`, in the dtype that was asked for.
        token_gains: what each token's row gains, float64 `[V]`, 0 or greater.
        metric: S, float64 `[H, H]`; ρ 1 where no output layer shares the weight.
        weights: what c_t adds to the diagonal of S, float64 `[V]`: row t counts by S + weights_t 1.
    """

    delta: torch.Tensor
    token_gains: torch.Tensor
    metric: torch.Tensor
    weights: torch.Tensor


class TokenCounts:
    """How often every token is an input, on the data of every donor and on those to keep.

    Args:
        name: the module, for messages.
        num_tokens: number of rows V.
        num_donors: number of abilities J; source J is the data to keep.
    """

    def __init__(self, name: str, num_tokens: int, *, num_donors: int) -> None:
        self._name = name
        self._counts = torch.zeros(num_donors + 1, num_tokens, dtype=torch.float64, device="cpu")

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of every source, J + 1 numbers."""
        return [int(count) for count in self._counts.sum(1)]

    def add_(self, source: int, ids: torch.Tensor) -> None:
        """Add token ids, int64 `[N]`."""
        self._counts[source] += torch.bincount(ids.cpu(), minlength=self._counts.shape[1])

    def shares(self, settings: FitSettings) -> tuple[torch.Tensor, torch.Tensor]:
        """The a_jt, float64 `[J, V]`, and the k_t times μ, float64 `[V]`.

        Raises:
            ActValueError: no data of an ability.
        """
        totals = self._counts.sum(1, keepdim=True)
        if not bool(totals[:-1].all()):
            raise ActValueError(
                f"{self._name}: no token of the ability's data reaches it, expected at least one (leave it out with "
                f"exclude_modules=[{self._name!r}])"
            )
        shares = self._counts / totals.clamp(min=1)
        return shares[:-1], shares[-1] * settings.keep_weight


def solve_tokens(
    counts: TokenCounts,
    differences: Callable[[slice], Sequence[torch.Tensor]],
    settings: FitSettings,
    *,
    width: int,
    dtype: torch.dtype,
) -> TokenSolution:
    """The change of an embedding whose weight nothing else uses.

    Args:
        counts: of its inputs.
        differences: gives D_j of some rows, float64 `[r, H]` for each donor.
        settings: μ, ε and λ.
        width: H.
        dtype: of the stored change.

    Raises:
        ActValueError: no data of an ability.
    """
    ability, keep = counts.shares(settings)
    num_rows = ability.shape[1]
    ridge = settings.ridge / num_rows
    deltas, token_gains = [], []
    for rows in _blocks(num_rows, width):
        given = differences(rows)
        device = given[0].device
        shares = ability[:, rows, None].to(device)
        metric = shares.sum(0) + keep[rows, None].to(device) + ridge  # [r, 1]
        wanted = torch.stack(list(given)).mean(0) * (ridge * settings.prior_scale)  # [r, H]
        for difference, share in zip(given, shares, strict=True):
            wanted = wanted + difference * share
        delta = wanted / metric
        token_gains.append((metric * delta.square()).sum(1).cpu())
        deltas.append(delta.to(dtype))
    metric = torch.eye(width, dtype=torch.float64) * ridge
    return TokenSolution(torch.cat(deltas), torch.cat(token_gains), metric, ability.sum(0) + keep)


def solve_tied(
    counts: TokenCounts,
    head: Metric,
    differences: Callable[[slice], Sequence[torch.Tensor]],
    settings: FitSettings,
    *,
    dtype: torch.dtype,
    tied_weight: float = 1.0,
) -> TokenSolution:
    """The change of an embedding that the output layer shares.

    Args:
        counts: of the embedding's inputs.
        head: metric of the output layer's inputs.
        differences: gives D_j of some rows, float64 `[r, H]` for each donor.
        settings: μ, ε and λ.
        dtype: of the stored change.
        tied_weight: factor on w, what the embedding's use counts beside the output layer's.

    Raises:
        ActValueError: no data of an ability.
    """
    ability, keep = counts.shares(settings)
    num_rows = ability.shape[1]
    scale = tied_weight * num_rows * head.ridge / settings.ridge  # w = m V
    values, basis = torch.linalg.eigh(head.matrix())  # Λ [H], Q [H, H]
    projected = [moments @ basis for moments in head.ability_moments()]  # A_j Q
    deltas, token_gains = [], []
    for rows in _blocks(num_rows, len(values)):
        given = differences(rows)
        shares = scale * ability[:, rows, None].to(values)
        metric = values + shares.sum(0) + scale * keep[rows, None].to(values)  # [r, H]
        wanted = torch.stack(list(given)).mean(0) @ basis * (head.ridge * settings.prior_scale)
        for difference, share, moments in zip(given, shares, projected, strict=True):
            wanted = wanted + difference @ moments + (difference @ basis) * share
        inside = wanted / metric
        token_gains.append((metric * inside.square()).sum(1).cpu())
        deltas.append((inside @ basis.T).to(dtype))
    weights = scale * (ability.sum(0) + keep)
    return TokenSolution(torch.cat(deltas), torch.cat(token_gains), head.matrix().cpu(), weights)


def _blocks(num_rows: int, width: int) -> list[slice]:
    block = max(_BLOCK // width, 1)
    return [slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block)]
