"""Composition: which layers and kinds of modules the channels of a mask belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from act_peft.analysis.groups import Grouping, groups_of
from act_peft.analysis.tables import Table, percent
from act_peft.channels.masks import ChannelMask

_HALF = 0.5


@dataclass(frozen=True)
class Part:
    """Some modules of a mask.

    Attributes:
        selected: number of their selected channels.
        channels: number of all their channels.
    """

    selected: int
    channels: int

    @property
    def density(self) -> float:
        """Selected channels / channels."""
        return self.selected / self.channels


@dataclass(frozen=True)
class Composition(Table):
    """Where the channels of a mask lie; `print` shows the table.

    Attributes:
        whole: the whole mask.
        kinds: kind of module -> its part of the mask, the largest first.
        layers: layer -> its part of the mask, in the model's order.
        cells: (layer, kind) -> the part of the mask where they meet.
    """

    whole: Part
    kinds: Mapping[str, Part]
    layers: Mapping[str, Part]
    cells: Mapping[tuple[str, str], Part]

    @property
    def dominant(self) -> str | None:
        """The kind of module that holds more than half of the mask; None if none does."""
        return next((kind for kind, part in self.kinds.items() if part.selected > _HALF * self.whole.selected), None)

    @property
    def warning(self) -> str | None:
        """What to say if one kind holds more than half of the mask; otherwise None."""
        if self.dominant is None or len(self.kinds) == 1:
            return None
        part = self.kinds[self.dominant]
        return (
            f"{percent(part.selected / self.whole.selected)} of the selected channels are {self.dominant}, which has "
            f"{percent(part.channels / self.whole.channels)} of all channels (scope='module' selects the same share "
            "of every module)"
        )

    @property
    def title(self) -> str:
        """What was found, in one line."""
        if not self.whole.selected:
            return f"none of {self.whole.channels:,} channels is selected"
        kind, part = next(iter(self.kinds.items()))
        share = percent(part.selected / self.whole.selected)
        found = f"{share} of the {self.whole.selected:,} selected channels are {kind}"
        return found if self.dominant else f"no kind of module dominates the mask: at most {found}"

    @property
    def notes(self) -> tuple[str, ...]:
        """The warning, if there is one."""
        return () if self.warning is None else (f"warning: {self.warning}",)

    def records(self) -> list[dict[str, Any]]:
        """One row for each kind, then one for each layer."""
        return [
            {
                "modules": name,
                "selected": part.selected,
                "of": part.channels,
                "density": part.density,
                "share of mask": part.selected / self.whole.selected if self.whole.selected else 0.0,
            }
            for name, part in [*self.kinds.items(), *self.layers.items()]
        ]


def measure_composition(mask: ChannelMask) -> Composition:
    """Count the channels of a mask by kind of module and by layer.

    A kind is the last part of a module's name, a layer the first number in it.

    Args:
        mask: the mask.

    Returns:
        The counts. Its `warning` says so if one kind of module holds more than half of the mask.

    Example:
        >>> from act_peft.analysis import measure_composition
        >>> mask = ChannelMask({"0.up": [0, 1, 2], "0.down": [1]}, {"0.up": 4, "0.down": 4})
        >>> print(measure_composition(mask).warning)
        75% of the selected channels are up, which has 50% of all channels (scope='module' selects the same share of \
every module)
    """
    kinds, layers = (groups_of(mask, grouping) for grouping in (Grouping.KIND, Grouping.LAYER))
    by_kind: dict[Any, Part] = {}
    by_layer: dict[Any, Part] = {}
    cells: dict[Any, Part] = {}
    for name, index in mask.items():
        found = Part(index.numel(), mask.num_channels[name])
        for parts, key in ((by_kind, kinds[name]), (by_layer, layers[name]), (cells, (layers[name], kinds[name]))):
            before = parts.get(key, Part(0, 0))
            parts[key] = Part(before.selected + found.selected, before.channels + found.channels)
    return Composition(
        whole=Part(mask.num_selected, sum(mask.num_channels.values())),
        kinds=dict(sorted(by_kind.items(), key=lambda item: -item[1].selected)),
        layers=by_layer,
        cells=cells,
    )
