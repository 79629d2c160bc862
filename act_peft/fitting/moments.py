"""What is kept of the inputs of a module: rows while they are few, second moments once they are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from act_peft.errors import ActValueError
from act_peft.fitting.metric import DualMetric, Metric, PrimalMetric
from act_peft.fitting.settings import FitSettings

# Up to this width second moments are summed in float64, wider ones in float32: those of a real model would take twice
# the memory, and the ridge is orders of magnitude greater than what rounding in float32 adds.
_DOUBLE_WIDTH = 512
_ROWS_AT_A_TIME = 4096
# Up to this width moments are small, and many small pieces of rows would be worse for the memory than they say.
_NARROW_WIDTH = 2048


@dataclass(frozen=True)
class SourceWeights:
    """What every source counts in the objective.

    Attributes:
        scale: m, the mean square that all sources are scaled to.
        ability: factor on the mean second moments of each donor's inputs.
        keep: factor on those of the inputs to keep: μ, or 0 without such data.
    """

    scale: float
    ability: tuple[float, ...]
    keep: float


def weigh(name: str, ability: Sequence[float], keep: float | None, keep_weight: float) -> SourceWeights:
    """Scale every ability's mean square to that of the data to keep.

    Args:
        name: what has these inputs, for messages.
        ability: mean square of the inputs on each donor's data.
        keep: mean square on the data to keep, None without any.
        keep_weight: μ.

    Raises:
        ActValueError: a mean square that is not finite.
    """
    given = [*ability, *([] if keep is None else [keep])]
    if not all(value < float("inf") for value in given):  # also false for NaN
        raise ActValueError(
            f"{name}: got inputs that are not finite (NaN or infinite), expected finite numbers (float16 overflows "
            "easily, load both models in bfloat16 or float32)"
        )
    # Without data to keep the donors' own mean square; inputs that are all zero constrain nothing, whatever m is.
    scale = keep or sum(ability) / len(ability) or 1.0
    return SourceWeights(
        scale, tuple(scale / value if value else 0.0 for value in ability), 0.0 if keep is None else keep_weight
    )


class InputMoments:
    """The inputs x of one or several modules, on the data of every donor and on those to keep.

    While there are few rows they are kept in the model's dtype: fewer than the inputs are wide, of wide inputs as long
    as they take less memory than their second moments would. Then they become sums of x xᵀ `[W, W]`, one for each
    source. Either way the objective is solved in the smaller form: with the rows if there are fewer than W, otherwise
    with the moments.

    Args:
        name: the module, for messages.
        width: number of inputs I.
        num_donors: number of abilities J; source J is the data to keep.
        has_bias: whether a 1 is appended to every row, so that W = I + 1.
        device: where the inputs are kept and solved with; a device with float64.

    Attributes:
        num_tokens: rows of every source, J + 1 numbers.
    """

    def __init__(
        self, name: str, width: int, *, num_donors: int, has_bias: bool, device: torch.device | str = "cpu"
    ) -> None:
        self._name = name
        self._device = torch.device(device)
        self._has_bias = has_bias
        self.width = width + has_bias
        self.num_tokens = [0] * (num_donors + 1)
        self._rows: list[list[torch.Tensor]] = [[] for _ in self.num_tokens]
        self._waiting = 0
        self._sums: list[torch.Tensor] | None = None

    @staticmethod
    def size(width: int, num_rows: int, *, num_donors: int, dtype: torch.dtype) -> int:
        """About how many bytes the inputs take.

        Args:
            width: number of inputs I.
            num_rows: rows of all sources.
            num_donors: number of abilities J.
            dtype: of the rows.
        """
        if num_rows < _rows_at_most(width, num_donors + 1, dtype):
            return num_rows * width * dtype.itemsize
        moments = (num_donors + 1) * width * width * _wide(width, dtype).itemsize
        return moments + width // 4 * width * dtype.itemsize

    def add_(self, source: int, rows: torch.Tensor) -> None:
        """Add inputs.

        Args:
            source: number of the donor, or J for data to keep.
            rows: `[N, I]`, any floating dtype and device; kept, so they must not change.
        """
        rows = rows.to(self._device)
        if self._has_bias:
            rows = nn.functional.pad(rows, (0, 1), value=1.0)  # [N, W]
        self._rows[source].append(rows)
        self.num_tokens[source] += len(rows)
        self._waiting += len(rows)
        limit = _rows_at_most(self.width, len(self.num_tokens), rows.dtype)
        if self._waiting >= (limit if self._sums is None else max(self.width // 4, 1)):
            self._fold()

    def metric(self, settings: FitSettings) -> Metric:
        """The metric of these inputs, and what solves in it.

        Raises:
            ActValueError: no data of an ability; inputs that are not finite.
        """
        *ability, keep = self.num_tokens
        if 0 in ability:
            raise ActValueError(
                f"{self._name}: no token of the ability's data reaches it, expected at least one (leave it out with "
                f"exclude_modules=[{self._name!r}])"
            )
        if self._sums is not None and self._waiting:
            self._fold()
        sums = self._sums
        if sums is None and sum(self.num_tokens) >= self.width:
            sums = [self._moments_of(parts) for parts in self._rows]
        squares = self._mean_squares()
        weights = weigh(self._name, squares[:-1], squares[-1] if keep else None, settings.keep_weight)
        shares = [
            weight / max(count, 1)
            for weight, count in zip((*weights.ability, weights.keep), self.num_tokens, strict=True)
        ]
        ridge = settings.ridge * weights.scale
        if sums is not None:
            *ability_sums, kept = (total.double() * share for total, share in zip(sums, shares, strict=True))
            return PrimalMetric(self._name, ability_sums, kept, ridge=ridge, prior_scale=settings.prior_scale)
        rows = [
            torch.cat([part.double() for part in parts]).mul_(share**0.5) if parts else None
            for parts, share in zip(self._rows, shares, strict=True)
        ]
        return DualMetric(self._name, rows, ridge=ridge, prior_scale=settings.prior_scale)

    def _moments_of(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum of x xᵀ `[W, W]` over the rows of a source, float64."""
        total = torch.zeros(self.width, self.width, dtype=torch.float64, device=self._device)
        if parts:
            for rows in torch.cat(list(parts)).split(_ROWS_AT_A_TIME):  # [n, W]
                wide = rows.double()
                total.addmm_(wide.T, wide)
        return total

    def _mean_squares(self) -> list[float]:
        """Mean of the diagonal of the mean x xᵀ, for every source."""
        squares = []
        for source, count in enumerate(self.num_tokens):
            total = 0.0 if self._sums is None else float(self._sums[source].diagonal().double().sum())
            total += sum(float(rows.double().square().sum()) for rows in self._rows[source])
            squares.append(total / max(count, 1) / self.width)
        return squares

    def _fold(self) -> None:
        """Turn the rows that wait into sums."""
        first = next(rows for parts in self._rows for rows in parts)
        wide = _wide(self.width, first.dtype)
        if self._sums is None:
            self._sums = [
                torch.zeros(self.width, self.width, dtype=wide, device=first.device) for _ in self.num_tokens
            ]
        for parts, total in zip(self._rows, self._sums, strict=True):
            if parts:
                rows = torch.cat(parts).to(total.dtype)  # [N, W]
                total.addmm_(rows.T, rows)
                parts.clear()
        self._waiting = 0


def _wide(width: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of second moments."""
    return torch.float64 if width <= _DOUBLE_WIDTH else torch.promote_types(dtype, torch.float32)


def _rows_at_most(width: int, num_sources: int, dtype: torch.dtype) -> int:
    """From how many rows on second moments are kept in their place."""
    if width <= _NARROW_WIDTH:
        return width
    return num_sources * width * _wide(width, dtype).itemsize // dtype.itemsize
