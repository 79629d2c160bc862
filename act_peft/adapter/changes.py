"""The changes of an adapter, module by module: the same questions for a model in memory and a folder on disk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from act_peft.adapter.config import ActConfig
from act_peft.adapter.file import AdapterFolder
from act_peft.adapter.stored import StoredDelta
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import merged_rows, wide_dtype
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.parameters import Parameters
from act_peft.disk.writing import TensorInfos
from act_peft.doors import OUTER
from act_peft.errors import ActLoadError
from act_peft.plain import in_markdown


class ModuleChange(ABC):
    """One module of an adapter.

    Attributes:
        name: name of the module in the base model.
        kind: its kind.
        num_channels: C.
        index: the selected channels, int64 `[K]`.
        width: I; V for an embedding, 1 for a norm.
        dtype: dtype of the delta.
        has_bias: whether the module has a bias.
        scale: factor of the deltas.
    """

    name: str
    kind: ChannelKind
    num_channels: int
    index: torch.Tensor
    width: int
    dtype: torch.dtype
    has_bias: bool
    scale = 1.0

    @abstractmethod
    def whole_infos(self) -> TensorInfos:
        """Dtype and shape of the module's whole parameters, by "weight" and "bias"."""

    @abstractmethod
    def _delta(self, part: str) -> torch.Tensor:
        """The delta of "weight" or "bias" in the module's orientation, without `scale`."""

    @abstractmethod
    def _original(self, part: str) -> torch.Tensor:
        """The whole "weight" or "bias" of the base."""

    def rows(self) -> torch.Tensor:
        """The delta of the weight, scaled, `[K, I]`."""
        delta = self._scaled("weight")
        return delta.unsqueeze(1) if self.kind.is_norm else delta.transpose(0, self.kind.channel_dim)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """The delta of the bias, scaled, `[K]`; None if there is none or it is zero."""
        delta = self._scaled("bias") if self.has_bias else None
        return delta if delta is not None and bool(delta.any()) else None

    def whole(self, part: str) -> torch.Tensor:
        """The whole "weight" or "bias" with the delta added, rounded once."""
        deltas = [(self.index, self._delta(part), self.scale)]
        return merged_rows(self._original(part), torch.arange(self.num_channels), deltas, dim=self.kind.axis_of(part))

    def _scaled(self, part: str) -> torch.Tensor:
        return self._delta(part) * self.scale


@dataclass(frozen=True)
class OtherTensor:
    """A tensor of an adapter that is no delta: dtype, shape, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class AdapterChanges:
    """An adapter in memory or on disk.

    Attributes:
        config: its configuration.
        modules: its changes, module by module.
        extra: key -> what was trained without deltas (modules that the adapter saves as a whole, tokens).
        of_base: parameter -> tensors of the base that were saved too (resized embeddings).
        known: the known module names of the base model.
        inputs: folders that are read.
        origin: description of the adapter, for the card.
    """

    config: ActConfig
    modules: list[ModuleChange]
    extra: dict[str, OtherTensor]
    of_base: dict[str, OtherTensor]
    known: list[str]
    inputs: list[Path]
    origin: str


def changes_in_folder(folder: AdapterFolder, checkpoint: Checkpoint | None) -> AdapterChanges:
    """The changes of a saved adapter. `checkpoint`, the base, is needed for whole parameters only.

    Raises:
        ActValueError: if its configuration cannot be used.
        ActLoadError: if configuration and tensors do not belong together.
    """
    config = folder.config
    base = None
    if checkpoint is not None:
        names = [f"{name}.{part}" for name, delta in folder.modules.items() for part in _parts(delta)]
        base = Parameters(checkpoint, names, fits=folder.fits, recognize=folder.recognize)
    modules: list[ModuleChange] = [
        FileChange(folder, name, config, base) for name, delta in folder.modules.items() if delta.index.numel()
    ]
    is_local = os.path.isdir(folder.location)
    name = os.path.basename(os.path.abspath(folder.location)) if is_local else folder.location
    return AdapterChanges(
        config=config,
        modules=modules,
        extra={**_trained(folder), **_tokens(folder)},
        of_base={name: _other(folder, tensor.key) for name, tensor in folder.byproducts.of_base.items()},
        known=list(folder.modules),
        inputs=[folder.folder, *([] if checkpoint is None else [checkpoint.folder])],
        origin=f"`{in_markdown(name)}`",
    )


def _trained(folder: AdapterFolder) -> dict[str, OtherTensor]:
    return {f"{OUTER}{name}": _other(folder, tensor.key) for name, tensor in folder.byproducts.saved.items()}


def _tokens(folder: AdapterFolder) -> dict[str, OtherTensor]:
    return {tokens.key: _other(folder, tokens.key) for tokens in folder.byproducts.tokens.values()}


def _other(folder: AdapterFolder, key: str) -> OtherTensor:
    return OtherTensor(folder.shard.dtype(key), folder.shard.shape(key), partial(folder.shard.tensor, key))


def _parts(delta: StoredDelta) -> dict[str, str]:
    """The parts of a module -> the keys of their deltas."""
    return {"weight": delta.weight, **({} if delta.bias is None else {"bias": delta.bias})}


class FileChange(ModuleChange):
    """One module of a saved adapter.

    Args:
        folder: the adapter; must stay open.
        name: name of the module.
        config: the adapter's configuration.
        base: the parameters of the base, for whole parameters.

    Raises:
        ActLoadError: if configuration and tensors do not belong together.
    """

    def __init__(self, folder: AdapterFolder, name: str, config: ActConfig, base: Parameters | None) -> None:
        delta = folder.modules[name]
        self._where = f"{folder.location}: {name}"
        entry = (config.adapted_modules or {}).get(name, {})
        num_channels = entry.get("channels")
        if num_channels is None:
            raise ActLoadError(
                f"{self._where}: adapted_modules does not say how many channels it has (load the adapter with PEFT "
                "and save it again)"
            )
        kind = _kind_of_file(self._where, delta, entry.get("kind"))
        dim = kind.channel_dim
        stored = folder.shard.dtype(delta.weight)
        self._folder, self._base, self._keys = folder, base, _parts(delta)
        weight = (*delta.weight_shape[:dim], num_channels, *delta.weight_shape[dim + 1 :])
        self._shapes = {"weight": weight, "bias": (num_channels,)}
        self.name, self.kind, self.num_channels, self.index = name, kind, num_channels, delta.index
        self.width = 1 if kind.is_norm else delta.weight_shape[1 - dim]
        self.dtype = stored if delta.scales is None else wide_dtype(stored, delta.scales.dtype)
        self.has_bias = delta.bias is not None

    def whole_infos(self) -> TensorInfos:
        """See `ModuleChange.whole_infos`.

        Raises:
            ActLoadError: if the adapter does not fit the base.
        """
        base, infos = cast(Parameters, self._base), {}
        for part in self._keys:
            name, shape = f"{self.name}.{part}", self._shapes[part]
            if not base.is_plain(name) or base.shape(name) != shape:
                raise ActLoadError(
                    f"{self._where}: {base.location} has a {part} {base.dtype(name)} {list(base.shape(name))}, "
                    f"expected plain numbers of shape {list(shape)} (the adapter was made for a different model)"
                )
            infos[part] = (base.dtype(name), shape)
        return infos

    def _delta(self, part: str) -> torch.Tensor:
        return self._folder.scaled(self.name, self._folder.shard.tensor(self._keys[part]), self.kind.axis_of(part))

    def _original(self, part: str) -> torch.Tensor:
        everything = torch.arange(self.num_channels)
        return cast(Parameters, self._base).rows(f"{self.name}.{part}", everything, self.kind.axis_of(part))


def _kind_of_file(where: str, delta: StoredDelta, recorded: Any) -> ChannelKind:
    """The recorded kind; for adapters of versions that recorded none, the only kind that the shapes allow."""
    if recorded is not None:
        try:
            return ChannelKind(recorded)
        except ValueError as error:
            raise ActLoadError(
                f"{where}: adapted_modules says it is a {str(recorded)[:40]!r}, expected one of "
                f"{', '.join(repr(kind.value) for kind in ChannelKind)} (upgrade act_peft)"
            ) from error
    shape, count = delta.weight_shape, delta.index.numel()
    if len(shape) == 1:
        return ChannelKind.RMS_NORM  # or a layer norm: neither has factors
    columns = ChannelKind.EMBEDDING if delta.bias is None else ChannelKind.CONV1D  # a Conv1D always has a bias
    if len(shape) == 2 and shape[0] == shape[1] == count:
        raise ActLoadError(
            f"{where}: adapted_modules does not say whether it is a linear or a {columns.value}, and its delta is "
            f"square, {list(shape)} (load the adapter with PEFT and save it again, or export the model in memory)"
        )
    return ChannelKind.LINEAR if shape[0] == count else columns
