"""An ACT adapter as donor: the base with this adapter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from act_peft.adapter.base_record import BaseComparison, fingerprint
from act_peft.adapter.file import AdapterFolder
from act_peft.adapter.stored import StoredDelta
from act_peft.channels.rows import wide_dtype
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActLoadError, ActValueError
from act_peft.transfer.donors.base import OpenDonor

_MERGE_IT = "merge the donor with merge_checkpoint, and name the merged folder"


class ActDonor(OpenDonor):
    """The difference of a channel is its delta; zero if the adapter has none.

    Args:
        folder: the adapter; closed with the donor.
        base: the parameters of the base.
        axes: module -> axis of its channels, for the modules that will be read.

    Raises:
        ActLoadError: the adapter does not fit the base, or holds other embeddings than the base has.
        ActValueError: the adapter holds rows of tokens.
    """

    def __init__(self, folder: AdapterFolder, base: Parameters, *, axes: Mapping[str, int]) -> None:
        self.location = folder.location
        self._folder = folder
        tokens = folder.byproducts.tokens
        if tokens:
            raise ActValueError(
                f"{next(iter(tokens))}: the donor {folder.location} has rows of tokens (trainable_token_indices), "
                f"expected channel deltas only ({_MERGE_IT})"
            )
        keys = CheckpointKeys(
            base,
            [f"{name}.weight" for name in folder.modules],
            fits=folder.fits,
            recognize=folder.recognize,
        )
        renamed = {keys.own_name(f"{n}.weight").rpartition(".")[0]: (n, d) for n, d in folder.modules.items()}
        self._deltas = {name: delta for name, (_, delta) in renamed.items()}
        self._own_names = {name: own for name, (own, _) in renamed.items()}
        for name in folder.byproducts.whole:
            self._check_whole(name, keys.own_name(name), base, axes)
        comparison = BaseComparison("the donor")
        for name, (own, delta) in renamed.items():
            if name not in axes or not delta.index.numel():
                continue
            self._check_fit(name, delta, base, axes[name])
            current = partial(_fingerprint, base, name, delta, axes[name])
            comparison.add_(name, folder.recorded_base(own), current)
        note = comparison.note()
        self.notes = [] if note is None else [note]

    def _check_fit(self, name: str, delta: StoredDelta, base: Parameters, dim: int) -> None:
        shape = base.shape(f"{name}.weight")
        has_bias = f"{name}.bias" in base
        expected = (*shape[:dim], delta.index.numel(), *shape[dim + 1 :])
        if (
            delta.weight_shape != expected
            or int(delta.index[-1]) >= shape[dim]
            or (delta.bias is None and has_bias and self._folder.config.include_bias)
            or (delta.bias is not None and not has_bias)
        ):
            raise ActLoadError(
                f"{name}: the donor {self.location} has deltas {list(delta.weight_shape)} for channels up to "
                f"{int(delta.index[-1])}, {'no' if delta.bias is None else 'and a'} bias, which do not fit the base's "
                f"weight {list(shape)} (the adapter was made for another model)"
            )

    def _check_whole(self, name: str, own: str, base: Parameters, axes: Mapping[str, int]) -> None:
        """Check that a whole tensor of the adapter is the base's, if it is asked for."""
        if own.rpartition(".")[0] not in axes or own not in base:
            return
        stored = self._folder.shard.tensor(self._folder.byproducts.whole[name].key)
        shape = base.shape(own)
        if tuple(stored.shape) != shape or not torch.equal(
            stored.to(base.dtype(own)), base.rows(own, torch.arange(shape[0]), 0).cpu()
        ):
            raise ActLoadError(
                f"{name}: the donor {self.location} holds the whole tensor, {list(stored.shape)}, with other values "
                f"than the base's {list(shape)}, expected the same or channel deltas only ({_MERGE_IT})"
            )

    def difference(self, module: str, part: str, index: torch.Tensor, dim: int, base: torch.Tensor) -> torch.Tensor:
        """See `OpenDonor.difference`."""
        difference = torch.zeros_like(base, dtype=wide_dtype(base.dtype))
        delta = self._deltas.get(module)
        key = None if delta is None else getattr(delta, part)
        if delta is None or key is None:
            return difference
        mine = torch.isin(index, delta.index).nonzero().squeeze(1)
        theirs = torch.isin(delta.index, index).nonzero().squeeze(1)
        rows = self._folder.shard.rows(key, theirs, dim)
        scaled = self._folder.scaled(self._own_names[module], rows, dim, theirs)
        return difference.index_copy_(dim, mine.to(base.device), scaled.to(difference))

    def close(self) -> None:
        """See `OpenDonor.close`."""
        self._folder.close()


def _fingerprint(base: Parameters, name: str, delta: StoredDelta, dim: int) -> str | None:
    if not base.is_plain(f"{name}.weight"):
        return None
    bias = None if delta.bias is None else base.rows(f"{name}.bias", delta.index, 0)
    return fingerprint(base.rows(f"{name}.weight", delta.index, dim), bias)
