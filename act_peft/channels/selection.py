"""The selection of the channels with the highest scores, and a warning where it takes one kind of module only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum

import torch

from act_peft.channels.masks import ChannelMask
from act_peft.channels.names import last_part
from act_peft.checks import finite_number, member_of, whole_number

# When a mask is too much of one kind of module. In a smaller mask a few channels decide, which says nothing.
FEWEST_CHANNELS = 10
MOST_OF_THE_MASK = 0.5
TIMES_ITS_SHARE = 2


class Scope(Enum):
    """The channels that `ChannelScores.top` ranks together: those of all modules (the paper), or of one module."""

    GLOBAL = "global"
    MODULE = "module"


class Normalization(Enum):
    """The rescaling of the scores of a module before `ChannelScores.top` ranks them."""

    NONE = "none"
    RMS = "rms"


def select_channels(
    scores: Mapping[str, torch.Tensor],
    num_comparable: Mapping[str, int],
    density: float,
    *,
    scope: str | Scope,
    normalize: str | Normalization,
    max_channels: int | None = None,
) -> ChannelMask:
    """The channels with the highest scores; rules and errors as in `ChannelScores.top`, without its warning.

    Args:
        scores: module name -> scores `[C]`.
        num_comparable: module name -> number of its first channels that can be selected.
        density: as in `ChannelScores.top`.
        scope: as there.
        normalize: as there.
        max_channels: as there.
    """
    density = finite_number(density, "density", least=0, most=1)
    select = _SELECTIONS[member_of(Scope, scope, "scope")]
    rescale = _NORMALIZATIONS[member_of(Normalization, normalize, "normalize")]
    if max_channels is not None:
        max_channels = whole_number(max_channels, "max_channels", least=1)
    ranked = {name: rescale(values[: num_comparable[name]]) for name, values in scores.items()}
    return ChannelMask(
        select(ranked, density, max_channels), {name: values.numel() for name, values in scores.items()}
    )


def dominance_text(mask: ChannelMask, num_comparable: Mapping[str, int]) -> str | None:
    """What to say if one kind of module dominates a mask, otherwise None.

    A kind is the last part of a module's name, such as `down_proj`. It dominates if it holds more than half of the
    mask and at least twice its share of all candidate channels. A mask of fewer than ten channels is too small to
    judge.

    Args:
        mask: the mask.
        num_comparable: module name -> number of its channels that could be selected.
    """
    if mask.num_selected < FEWEST_CHANNELS:
        return None
    selected, candidates = _by_kind({name: index.numel() for name, index in mask.items()}), _by_kind(num_comparable)
    kind = max(selected, key=lambda kind: selected[kind])
    share, expected = selected[kind] / mask.num_selected, candidates[kind] / sum(candidates.values())
    if share <= MOST_OF_THE_MASK or share < TIMES_ITS_SHARE * expected:
        return None
    return (
        f"{share:.0%} of the selected channels belong to {kind!r}, which has {expected:.0%} of the candidates, "
        "expected a mask of several kinds of modules (take the same share of every module with scope='module', or "
        f"leave these modules out with exclude_modules=[{kind!r}] in localize)"
    )


def _by_kind(counts: Mapping[str, int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, count in counts.items():
        totals[last_part(name)] = totals.get(last_part(name), 0) + count
    return totals


def _order(values: torch.Tensor) -> torch.Tensor:
    """Indices `[C]` from the highest value down; the sort is stable, so the lower index wins among equals."""
    return values.sort(descending=True, stable=True).indices


def _select_global(scores: Mapping[str, torch.Tensor], density: float, most: int | None) -> dict[str, torch.Tensor]:
    everything = torch.cat(list(scores.values()))
    order = _order(everything)
    if most is not None:  # only the best of every module stay in the ranking
        allowed = torch.cat([_marked(_order(values)[:most], values.numel()) for values in scores.values()])
        order = order[allowed[order]]
    selected = _marked(order[: round(density * everything.numel())], everything.numel())
    parts = selected.split([values.numel() for values in scores.values()])
    return {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}


def _select_per_module(
    scores: Mapping[str, torch.Tensor], density: float, most: int | None
) -> dict[str, torch.Tensor]:
    return {name: _order(values)[: round(density * values.numel())][:most] for name, values in scores.items()}


def _marked(index: torch.Tensor, size: int) -> torch.Tensor:
    """Bool `[size]`, true at `index`."""
    marked = torch.zeros(size, dtype=torch.bool)
    marked[index] = True
    return marked


def _divide_by_rms(scores: torch.Tensor) -> torch.Tensor:
    largest = float(scores.abs().max())
    if largest == 0:
        return scores
    scores = scores / largest  # before squaring, so that neither huge nor tiny scores leave the range of float64
    return scores / math.sqrt(float(scores.square().mean()))


_SELECTIONS: dict[Scope, Callable[[Mapping[str, torch.Tensor], float, int | None], dict[str, torch.Tensor]]] = {
    Scope.GLOBAL: _select_global,
    Scope.MODULE: _select_per_module,
}

_NORMALIZATIONS: dict[Normalization, Callable[[torch.Tensor], torch.Tensor]] = {
    Normalization.NONE: lambda scores: scores,
    Normalization.RMS: _divide_by_rms,
}
