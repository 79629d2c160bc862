"""The modules of several adapters of one base: their common structure, checked before anything is combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from act_peft.adapter.changes import AdapterChanges, ModuleChange
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import wide_dtype
from act_peft.combination.conflicts import Conflicts
from act_peft.combination.rules import Rule, WeightedRows, combined_rows, union_index
from act_peft.errors import ActLoadError, ActValueError
from act_peft.layers.deltas import PREFIX


@dataclass(frozen=True)
class Source:
    """One of the adapters: its name, its deltas and its weight."""

    name: str
    changes: AdapterChanges
    weight: float


@dataclass(frozen=True)
class UnionModule:
    """A module with channels of at least one adapter.

    Attributes:
        name: of the module.
        kind, num_channels, width: as in `ModuleChange`, the same for all adapters.
        has_bias: whether an adapter changes the bias.
        index: the channels of all adapters, int64 `[K]`, ascending.
        dtype: dtype of the combined deltas: float32, or wider if an adapter has wider ones.
        changes: one for each adapter, in order; None for an adapter without channels in the module.
    """

    name: str
    kind: ChannelKind
    num_channels: int
    width: int
    has_bias: bool
    index: torch.Tensor
    dtype: torch.dtype
    changes: tuple[ModuleChange | None, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the combined deltas by "weight" and "bias", in the module's orientation."""
        count = self.index.numel()
        weight = [count] if self.kind.is_norm else [self.width, self.width]
        weight[self.kind.channel_dim] = count
        return {"weight": tuple(weight), **({"bias": (count,)} if self.has_bias else {})}

    def combine(self, sources: Sequence[Source], rule: Rule, conflicts: Conflicts | None) -> dict[str, torch.Tensor]:
        """Read the deltas, count their conflicts, and return the combined deltas, with the keys of `shapes`.

        Raises:
            ActValueError: deltas or combined deltas that are not finite.
        """
        parts = self.read(sources)
        if conflicts is not None:
            conflicts.add_(self.name, parts)
        rows = combined_rows([part for part in parts if part is not None], rule).to(self.dtype)  # [K, I (+ 1)]
        if not torch.isfinite(rows).all():
            raise ActValueError(
                f"{self.name}: the combined deltas hold NaN or infinity, expected finite numbers (use smaller weights)"
            )
        weight = rows[:, : self.width]
        shape = self.shapes()["weight"]
        deltas = {"weight": (weight.T if self.kind.channel_dim else weight).reshape(shape).contiguous()}
        if self.has_bias:
            deltas["bias"] = rows[:, self.width].contiguous()
        return deltas

    def read(self, sources: Sequence[Source]) -> list[WeightedRows | None]:
        """The deltas of each adapter: `[K, I]`, or `[K, I + 1]` with the bias elements as the last column."""
        return [
            None if change is None else _read(source, change, with_bias=self.has_bias)
            for source, change in zip(sources, self.changes, strict=True)
        ]


def _read(source: Source, change: ModuleChange, *, with_bias: bool) -> WeightedRows:
    rows = change.rows()
    if with_bias:
        bias = rows.new_zeros(len(rows)) if change.bias is None else change.bias
        rows = torch.cat([rows, bias.to(rows).unsqueeze(1)], dim=1)
    if not torch.isfinite(rows).all():
        raise ActValueError(
            f"{change.name}: the deltas of {source.name} hold NaN or infinity, expected finite numbers (the adapter "
            "is broken)"
        )
    return WeightedRows(change.index, rows, source.weight)


def union_modules(sources: Sequence[Source]) -> list[UnionModule]:
    """The modules of several adapters, wide dtypes first, then by name, in the order of tensors in a file.

    Raises:
        ActLoadError: adapters with different shapes of a module.
        ActValueError: no channels at all.
    """
    found = [{change.name: change for change in source.changes.modules} for source in sources]
    names = sorted({name for modules in found for name in modules}, key=lambda name: f"{name}.{PREFIX}")
    if not names:
        raise ActValueError("adapters: got no channel in any of them, expected at least one (all of them are empty)")
    union = [_union(name, sources, [modules.get(name) for modules in found]) for name in names]
    return sorted(union, key=lambda module: -module.dtype.itemsize)


def _union(name: str, sources: Sequence[Source], changes: Sequence[ModuleChange | None]) -> UnionModule:
    present = [(s, c) for s, c in zip(sources, changes, strict=True) if c is not None]
    first_source, first = present[0]
    for source, change in present[1:]:
        leaves_out = not (source.changes.config.include_bias and first_source.changes.config.include_bias)
        if _layout(change) != _layout(first) or (change.has_bias != first.has_bias and not leaves_out):
            raise ActLoadError(
                f"{name}: {source.name} changes {_layout_text(change)}, {first_source.name} {_layout_text(first)}; "
                "expected adapters of the same base (they were made for different models)"
            )
    return UnionModule(
        name=name,
        kind=first.kind,
        num_channels=first.num_channels,
        width=first.width,
        has_bias=any(change.has_bias for _, change in present),
        index=union_index([change.index for _, change in present]),
        dtype=wide_dtype(*(change.dtype for _, change in present)),
        changes=tuple(changes),
    )


def _layout(change: ModuleChange) -> tuple[object, ...]:
    return change.kind.channel_dim, change.kind.is_norm, change.num_channels, change.width


def _layout_text(change: ModuleChange) -> str:
    bias = "a bias" if change.has_bias else "no bias"
    return f"a {change.kind.value} of {change.num_channels} channels, width {change.width}, {bias}"
