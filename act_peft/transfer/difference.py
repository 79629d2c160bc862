"""Transfer: the donor's difference of the selected channels becomes the delta of an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import cast

import torch

from act_peft.adapter.models import record_of
from act_peft.channels.origin import ModelRecord, Origin, check_models
from act_peft.channels.rows import ChannelRows
from act_peft.disk.locations import lasting_name
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActValueError, ActWarning
from act_peft.transfer.donors import OpenDonor
from act_peft.transfer.lineage import Resemblance


class Transfer:
    """A donor that fits the base, and the deltas from it; a context manager that closes the donor.

    Args:
        base: the parameters of the base.
        donor: the donor.
        axes: module -> axis of its channels.
        origin: the models that the channels were found with, if they are known.

    Raises:
        ActValueError: they were found with this base as donor. The donor is closed then.
    """

    def __init__(
        self, base: Parameters, donor: OpenDonor, axes: Mapping[str, int], *, origin: Origin | None = None
    ) -> None:
        self._base, self._donor, self._axes = base, donor, axes
        self._notes = list(donor.notes)
        self._origin_notes = self._compare(origin)
        self._resemblance = Resemblance()
        self._differs = False

    def _compare(self, origin: Origin | None) -> list[str]:
        """Compare base and donor with the models that the channels were found with."""
        if origin is None:
            return []
        theirs = ModelRecord(lasting_name(self._donor.location))
        try:
            if self._donor.parameters is not None:
                theirs = record_of(self._donor.parameters, origin.modules)
            return check_models(origin, base=record_of(self._base, origin.modules), donor=theirs)
        except BaseException:
            self._donor.close()
            raise

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._donor.close()

    def common(self, index: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The selected channels without those beyond the common vocabulary.

        Args:
            index: module -> selected channels, int64 `[K]`.

        Raises:
            ActValueError: no channel of a module is left.
        """
        kept = dict(index)
        for name, channels in index.items():
            limit = self._donor.common_channels(name) if self._axes[name] == 0 else None
            if limit is None or int(channels[-1]) < limit:
                continue
            kept[name] = channels[channels < limit]
            dropped = channels.numel() - kept[name].numel()
            if not kept[name].numel():
                raise ActValueError(
                    f"{name}: all {dropped} selected channels lie beyond the {limit} tokens that donor and base have "
                    f"in common, expected some below (leave the module out with exclude_modules=[{name!r}])"
                )
            self._notes.append(f"{name}: {dropped} selected channels beyond the common vocabulary are left out")
        return kept

    def deltas(
        self, index: Mapping[str, torch.Tensor], *, transfer_scale: float
    ) -> Iterator[tuple[str, ChannelRows, ChannelRows]]:
        """Module by module: its name, the base's selected channels, and their deltas.

            delta = transfer_scale * (donor - base)          in float32 or wider

        Args:
            index: module -> selected channels, int64 `[K]`, ascending.
            transfer_scale: λ.

        Raises:
            ActValueError: values that are not finite, or quantized.
        """
        for name, channels in index.items():
            channels = channels.cpu()
            base: dict[str, torch.Tensor | None] = {"weight": None, "bias": None}
            deltas = dict(base)
            for part, dim in (("weight", self._axes[name]), ("bias", 0)):
                if f"{name}.{part}" not in self._base:
                    continue
                rows = self._base.rows(f"{name}.{part}", channels, dim)
                difference = self._donor.difference(name, part, channels, dim, rows)
                self._resemblance.add_(name, rows, difference)
                self._differs = self._differs or bool(difference.any())
                base[part], deltas[part] = rows, difference.mul_(transfer_scale)
            yield (
                name,
                ChannelRows(channels, cast(torch.Tensor, base["weight"]), base["bias"]),
                ChannelRows(channels, cast(torch.Tensor, deltas["weight"]), deltas["bias"]),
            )

    def warn(self, *, stacklevel: int) -> None:
        """Warn about differences between donor and base that do not prevent a transfer; to be called after `deltas`.

        Args:
            stacklevel: as in `warnings.warn`, counted from the caller.

        Warns:
            ActWarning: vocabulary, settings or ancestor differ; the selected weights are all equal; the channels were
                found with other models.
        """
        if not self._differs:
            message = (
                f"{self._donor.location}: has the same weights as the base in all selected channels; nothing is "
                "transferred"
            )
            warnings.warn(message, ActWarning, stacklevel=stacklevel + 1)
        notes = self._notes if self._donor.is_adapter else [*self._notes, *self._resemblance.notes()]
        if notes:
            warnings.warn(f"donor and base differ: {'; '.join(notes)}", ActWarning, stacklevel=stacklevel + 1)
        for note in self._origin_notes:
            warnings.warn(note, ActWarning, stacklevel=stacklevel + 1)
