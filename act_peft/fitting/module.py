"""What a fit found for one module, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.origin import Origin
from act_peft.fitting.settings import FitSettings


@dataclass(frozen=True, eq=False)
class FittedModule:
    """The fitted change of one weight, on the CPU.

    Attributes:
        names: the modules that use the weight, first the one that gives the change its name; more than one for tied
            embeddings.
        head: the output layer among them, None without one.
        kind: of the first of them.
        delta: the change, `[C, I]` with a channel in each row (`[C, 1]` for a norm), `[V, H]` with a token in each row
            for an embedding; in the dtype of the base's weight.
        bias: the change of the bias, `[C]`, None where the module has none.
        gains: how far the objective falls by each row, float64 `[C]` or `[V]`, 0 or greater.
        directions: of a linear module the strongest left singular vectors of the change (with that of the bias) in
            the metric of its inputs, `[C, K]`; None of others.
        strengths: all singular values, float64 `[min(C, I)]`, falling, their squares sum up to the gains; None of
            others and without directions.
        token_metric: of an embedding S, float64 `[H, H]`, and
        token_weights: c_t, float64 `[V]`: row t of the change counts by S + c_t 1; None of others.
        fingerprint: of the base's weight and bias that the change was fitted for.
    """

    names: tuple[str, ...]
    head: str | None
    kind: ChannelKind
    delta: torch.Tensor
    bias: torch.Tensor | None
    gains: torch.Tensor
    directions: torch.Tensor | None
    strengths: torch.Tensor | None
    token_metric: torch.Tensor | None
    token_weights: torch.Tensor | None
    fingerprint: str

    @property
    def is_embedding(self) -> bool:
        """Whether the rows are tokens."""
        return self.kind is ChannelKind.EMBEDDING

    @property
    def is_linear(self) -> bool:
        """Whether the change has a form of low rank."""
        return not self.is_embedding and not self.kind.is_norm

    @property
    def is_tied(self) -> bool:
        """Whether several modules use the weight."""
        return len(self.names) > 1

    def weight_change(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The change of some channels (tokens of an embedding), in the module's own orientation.

        Args:
            rows: int64 `[K]`; all by default.
        """
        delta = self.delta if rows is None else self.delta.index_select(0, rows)
        if self.kind.is_norm:
            return delta[:, 0]
        return delta.T if self.kind is ChannelKind.CONV1D else delta


@dataclass(frozen=True)
class FitRecord:
    """What a fit was made from.

    Attributes:
        settings: μ, ε, λ.
        num_tokens: counted tokens of every donor's data, and last of the data to keep (0 without any).
        base: path or Hub id of the base, None where it had none.
        donors: the same of every donor.
        task_type: PEFT's task type of the base, None for other models than causal language models.
        origins: the records of the base and each donor; none from a file of an older version.
    """

    settings: FitSettings
    num_tokens: tuple[int, ...]
    base: str | None
    donors: tuple[str | None, ...]
    task_type: str | None
    origins: tuple[Origin, ...] = ()

    @property
    def origin(self) -> Origin | None:
        """The records of base and donor; of several donors, none."""
        return self.origins[0] if len(self.origins) == 1 else Origin(self.origins[0].base) if self.origins else None


Modules = Mapping[str, FittedModule]
