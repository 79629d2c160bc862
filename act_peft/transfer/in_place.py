"""Add the difference of selected channels to a model in memory, in place, and take it away again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType

import torch
from torch import nn

from act_peft.channels.kinds import kind_of
from act_peft.channels.masks import ChannelMask
from act_peft.channels.rows import merged_rows
from act_peft.errors import ActValueError
from act_peft.transfer.difference import Transfer


@dataclass(frozen=True)
class _MovingRows:
    """The channels of one parameter that are overwritten, those of the smallest mask first.

    The first `counts[m]` of them belong to mask number m. `original` and `difference` have K along `dim`, in the dtype
    and on the device of the parameter.
    """

    module: nn.Module
    part: str
    dim: int
    index: torch.Tensor
    original: torch.Tensor
    difference: torch.Tensor
    counts: tuple[int, ...]


class RowMoves:
    """Set the channels of growing masks to `base + transfer_scale * (donor - base)`; a context manager.

    The donor's difference is read when the object is created. Inside the context `move_` writes only the rows that
    change from one setting to the next. Modules that share a weight (tied embeddings) get separate weights, as they do
    with an adapter. Afterwards, also after an exception, every byte and every tie is as before.

    Memory: originals and differences of the rows of the largest mask, in the base's dtype, and a copy of each tied
    weight that changes.

    Args:
        base: a model without adapters.
        transfer: a donor, checked against it.
        masks: at least one; each is a subset of the next one.

    Attributes:
        num_channels: for each mask, the number of its channels that base and donor have in common.

    Raises:
        ActValueError: masks that are not nested; no channel in common; values that are not finite.
    """

    def __init__(self, base: nn.Module, transfer: Transfer, masks: Sequence[ChannelMask]) -> None:
        for number, (smaller, larger) in enumerate(pairwise(masks)):
            surplus = (smaller - larger).num_selected
            if surplus:
                raise ActValueError(
                    f"masks: {surplus} channels of mask {number} are not in the next one, expected nested masks"
                )
        uses = Counter(id(p) for module in base.modules() for p in module._parameters.values() if p is not None)
        self._shared = {address for address, count in uses.items() if count > 1}
        self._rows: list[_MovingRows] = []
        self._tied: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._last = len(masks) - 1
        self._reached, self._scale = -1, 0.0  # mask and scale that the base has now; no mask yet
        totals = [0] * len(masks)
        index = transfer.common({name: channels for name, channels in masks[-1].items() if channels.numel()})
        for name, original, difference in transfer.deltas(index, transfer_scale=1.0):
            outside = torch.stack([~torch.isin(index[name], mask[name]) for mask in masks]).sum(0)  # [K]
            order = outside.argsort(stable=True)
            counts = tuple(int((outside <= number).sum()) for number in range(len(masks)))
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            module = base.get_submodule(name)
            for part in ("weight", "bias"):
                rows, change = getattr(original, part), getattr(difference, part)
                if rows is not None:
                    dim = kind_of(module).axis_of(part)
                    sorting = order.to(rows.device)
                    rows, change = (tensor.to(rows.dtype).index_select(dim, sorting) for tensor in (rows, change))
                    channels = index[name][order].to(rows.device)
                    self._rows.append(_MovingRows(module, part, dim, channels, rows, change, counts))
        self.num_channels = tuple(totals)

    def __enter__(self) -> RowMoves:
        try:
            for rows in self._rows:
                parameter = rows.module._parameters[rows.part]
                if parameter is not None and id(parameter) in self._shared:
                    own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    self._tied.append((rows.module, rows.part, parameter))
                    rows.module._parameters[rows.part] = own
        except BaseException:  # out of memory, Ctrl-C: Python does not call __exit__ then
            self._tie()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = {(module, part) for module, part, _ in self._tied}
        self._tie()
        for rows in self._rows:
            if (rows.module, rows.part) not in own:
                _restore(rows, 0, rows.counts[-1])
        torch.clear_autocast_cache()
        self._reached = -1

    def _tie(self) -> None:
        for module, part, parameter in self._tied:
            module._parameters[part] = parameter
        self._tied = []

    def move_(self, number: int, transfer_scale: float) -> None:
        """Set the channels of one mask, and restore all others.

            row = round(base + transfer_scale * (donor - base))          rounded once, to the base's dtype

        Args:
            number: number of the mask.
            transfer_scale: λ.
        """
        reached, scale = self._reached, self._scale
        # A write may be interrupted. Until it is complete, every row counts as changed.
        self._reached, self._scale = self._last, float("nan")
        for rows in self._rows:
            end = rows.counts[number]
            old = rows.counts[reached] if reached >= 0 else 0
            _write(rows, min(old, end) if transfer_scale == scale else 0, end, transfer_scale)
            _restore(rows, end, max(old, end))
        torch.clear_autocast_cache()  # of casts of the weights as they were
        self._reached, self._scale = number, transfer_scale


def _write(rows: _MovingRows, start: int, end: int, transfer_scale: float) -> None:
    index = rows.index[start:end]
    if index.numel():
        original, difference = (t.narrow(rows.dim, start, end - start) for t in (rows.original, rows.difference))
        _copy(rows, index, merged_rows(original, index, [(index, difference, transfer_scale)], dim=rows.dim))


def _restore(rows: _MovingRows, start: int, end: int) -> None:
    if end > start:
        _copy(rows, rows.index[start:end], rows.original.narrow(rows.dim, start, end - start))


def _copy(rows: _MovingRows, index: torch.Tensor, values: torch.Tensor) -> None:
    # Through `data`: a graph of the user, with a backward pass still to come, may hold the parameter. Its bytes will
    # be the same again by then.
    getattr(rows.module, rows.part).data.index_copy_(rows.dim, index, values)
