"""`FittedTransfer`: the fitted changes of a base's modules, and what can be made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.fitting.settings import FitSettings


@dataclass(frozen=True, eq=False)
class FittedModule:
    """The fitted change of one weight, on the CPU.

    Attributes:
        names: the modules that use the weight; more than one for tied embeddings.
        kind: of the first of them.
        delta: the change, `[C, I]` with a channel in each row (`[C, 1]` for a norm), `[V, H]` with a token in each row
            for an embedding; in the dtype of the base's weight.
        bias: the change of the bias, `[C]`, None where the module has none.
        gains: how far the objective falls by each row, float64 `[C]` or `[V]`, 0 or greater.
        column_gains: of an embedding that is not tied, how far it falls by each column, float64 `[H]`; else None.
        directions: of a linear module the strongest left singular vectors of the change (and that of the bias) in the
            metric of its inputs, `[C, K]`; else `[C, 0]`.
        strengths: all singular values, float64 `[min(C, I)]`, falling; their squares sum up to the gains.
        fingerprint: of the base's weight and bias that the change was fitted for.
    """

    names: tuple[str, ...]
    kind: ChannelKind
    delta: torch.Tensor
    bias: torch.Tensor | None
    gains: torch.Tensor
    column_gains: torch.Tensor | None
    directions: torch.Tensor
    strengths: torch.Tensor
    fingerprint: str


@dataclass(frozen=True, eq=False, repr=False)
class FittedTransfer:
    """What `fit` found: a change of every module, and what each channel of it gains."""

    modules: Mapping[str, FittedModule]
    settings: FitSettings
    num_tokens: tuple[int, ...]
    base: str | None = None
    donors: tuple[str | None, ...] = field(default=())
    task_type: str | None = None

    @property
    def gains(self) -> ChannelScores:
        """How far the objective falls by each channel; tied embeddings have rows of tokens and are left out."""
        gains = {}
        for name, module in self.modules.items():
            found = module.column_gains if module.kind is ChannelKind.EMBEDDING else module.gains
            if found is not None:
                gains[name] = found
        return ChannelScores(gains, self.num_tokens[0], kind=ScoreKind.ATTRIBUTION)
