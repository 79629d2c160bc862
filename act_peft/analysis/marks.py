"""Several masks of one model side by side, for counting what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from act_peft.channels.masks import ChannelMask
from act_peft.errors import ActTypeError, ActValueError


@dataclass(frozen=True, eq=False)
class Marks:
    """The channels of M modules that n masks select. A module that a mask does not cover counts as not selected.

    Attributes:
        names: names of the masks.
        marked: bool `[n, C]`, over the channels of all modules.
        sizes: number of channels of every module, int64 `[M]`.
        selected: number of selected channels, int64 `[n, M]`.
    """

    names: tuple[str, ...]
    marked: torch.Tensor
    sizes: torch.Tensor
    selected: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Number of channels of each mask, float64 `[n]`."""
        return self.selected.sum(1).double()

    def shared(self) -> torch.Tensor:
        """Number of channels that each pair of masks shares, float64 `[n, n]`."""
        return torch.tensor([[float((a & b).sum()) for b in self.marked] for a in self.marked], dtype=torch.float64)

    def shared_by_chance(self) -> torch.Tensor:
        """The same on average for random masks with as many channels of every module, `[n, n]`.

        Each pair counts as independent: k_a k_b / C in a module of C channels.
        """
        selected = self.selected.double()
        return (selected / self.sizes) @ selected.T

    def jaccard(self, shared: torch.Tensor) -> torch.Tensor:
        """`shared / (a + b - shared)` for every pair `[n, n]`; 1 for two empty masks."""
        union = self.counts[:, None] + self.counts[None, :] - shared
        return torch.where(union > 0, shared / union.clamp_min(1e-300), torch.ones_like(shared))


def mark(masks: Mapping[str, ChannelMask]) -> Marks:
    """Put masks side by side.

    Args:
        masks: name -> mask, at least one.

    Raises:
        ActTypeError: no mapping, or something else than masks in it.
        ActValueError: no mask, or masks that disagree on a module's number of channels.
    """
    given = masks.values() if isinstance(masks, Mapping) else [masks]
    wrong = [mask for mask in given if not isinstance(mask, ChannelMask)]
    if wrong:
        raise ActTypeError(f"masks: got {type(wrong[0]).__name__}, expected a dict of ChannelMask by name")
    if not masks:
        raise ActValueError("masks: got none, expected at least one")
    sizes: dict[str, int] = {}
    for title, mask in masks.items():
        for name, count in mask.num_channels.items():
            if sizes.setdefault(name, count) != count:
                raise ActValueError(
                    f"{name}: got {sizes[name]} channels in one mask and {count} in {title}, expected masks of the "
                    "same model"
                )
    starts, total = {}, 0
    for name, count in sizes.items():
        starts[name], total = total, total + count
    marked = torch.zeros(len(masks), total, dtype=torch.bool)
    selected = torch.zeros(len(masks), len(sizes), dtype=torch.int64)
    places = {name: number for number, name in enumerate(sizes)}
    for row, mask in enumerate(masks.values()):
        for name, index in mask.items():
            marked[row, starts[name] + index] = True
            selected[row, places[name]] = index.numel()
    return Marks(tuple(masks), marked, torch.tensor(list(sizes.values())), selected)
