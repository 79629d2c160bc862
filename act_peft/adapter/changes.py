"""What an adapter changes, module by module, whether it is in a model in memory or in a folder on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from act_peft.adapter.config import ActConfig
from act_peft.adapter.file import AdapterFolder, ModuleDelta
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import merged_rows, wide_dtype
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import key_for, prefix_change
from act_peft.disk.shard import DTYPES
from act_peft.errors import ActError, ActLoadError, ActValueError

OUTER = "base_model.model."  # what PEFT puts before the names of modules in an adapter's file


@dataclass(frozen=True)
class ModuleChange:
    """One module of the adapter.

    Attributes:
        name: its name in the base model.
        kind: what kind of module it is.
        num_channels: C.
        index: the selected channels, int64 `[K]`.
        width: I; V for an embedding, 1 for a norm.
        dtype: dtype of the delta.
        rows: reads the delta of the weight, scaled, `[K, I]`.
        has_bias: whether the module has a bias.
        bias: the delta of the bias, scaled, `[K]`; None where there is none or it is zero.
        whole_infos: "weight", "bias" -> dtype and shape of the module's whole parameters.
        whole: reads one of these with the delta applied, rounded once.
    """

    name: str
    kind: ChannelKind
    num_channels: int
    index: torch.Tensor
    width: int
    dtype: torch.dtype
    rows: Callable[[], torch.Tensor]
    has_bias: bool
    bias: torch.Tensor | None
    whole_infos: Callable[[], Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
    whole: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class AdapterChanges:
    """An adapter in memory or on disk.

    Attributes:
        config: its configuration.
        modules: what it changes.
        extra: tensors that go along as they are (modules that the adapter itself saves as a whole, trained tokens).
        known: names of modules of the base model, as far as they are known.
        inputs: folders that are read.
        origin: what it is, for the card.
    """

    config: ActConfig
    modules: list[ModuleChange]
    extra: dict[str, torch.Tensor]
    known: list[str]
    inputs: list[Path]
    origin: str


def changes_in_folder(folder: AdapterFolder, checkpoint: Checkpoint | None) -> AdapterChanges:
    """The changes of a saved adapter; only biases are read now. `checkpoint` is needed for whole parameters.

    Raises:
        ActValueError: if its configuration cannot be used.
        ActLoadError: if configuration and tensors do not belong together.
    """
    try:
        config = ActConfig.from_pretrained(os.fspath(folder.folder))
    except ActError:
        raise
    except (ValueError, TypeError) as error:
        raise ActValueError(
            f"{folder.location}: adapter_config.json cannot be used ({str(error)[:200]}), expected that of an ACT "
            "adapter (it is damaged)"
        ) from error
    base = None
    if checkpoint is not None:
        base = checkpoint, prefix_change([f"{name}.weight" for name in folder.modules], checkpoint.names)
    modules = [
        _from_file(folder, name, delta, config, base) for name, delta in folder.modules.items() if delta.index.numel()
    ]
    is_local = os.path.isdir(folder.location)
    name = os.path.basename(os.path.abspath(folder.location)) if is_local else folder.location
    return AdapterChanges(
        config=config,
        modules=modules,
        extra={},
        known=list(folder.modules),
        inputs=[folder.folder, *([] if checkpoint is None else [checkpoint.folder])],
        origin=f"`{name}`",
    )


def _from_file(
    folder: AdapterFolder,
    name: str,
    delta: ModuleDelta,
    config: ActConfig,
    base: tuple[Checkpoint, tuple[str, str]] | None,
) -> ModuleChange:
    where = f"{folder.location}: {name}"
    entry = (config.adapted_modules or {}).get(name, {})
    count = delta.index.numel()
    num_channels = entry.get("channels")
    if type(num_channels) is not int or int(delta.index[-1]) >= num_channels:
        raise ActLoadError(
            f"{where}: adapted_modules says {str(num_channels)[:40]} channels, expected a number greater than the "
            f"greatest selected channel, {int(delta.index[-1])} (adapter_config.json does not belong to the tensors)"
        )
    kind = _kind_of_file(where, delta, entry.get("kind"))
    dim = kind.channel_dim
    if len(delta.weight_shape) != (1 if kind.is_norm else 2) or delta.weight_shape[dim] != count:
        raise ActLoadError(
            f"{where}: act_delta_weight has {list(delta.weight_shape)}, expected that of a {kind.value} with {count} "
            "channels (the file is damaged)"
        )
    dtype = DTYPES[folder.shard.info(delta.weight).dtype]
    shapes = {"weight": (*delta.weight_shape[:dim], num_channels, *delta.weight_shape[dim + 1 :])}
    deltas = {"weight": delta.weight}
    if delta.bias is not None:
        shapes["bias"], deltas["bias"] = (num_channels,), delta.bias

    def whole_infos() -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        checkpoint, change = cast(Any, base)
        infos = {}
        for part, shape in shapes.items():
            info = checkpoint.info(key_for(f"{name}.{part}", change))
            if not info.is_plain or info.shape != shape:
                raise ActLoadError(
                    f"{where}: {checkpoint.location} has a {part} {info.dtype} {list(info.shape)}, expected plain "
                    f"numbers of shape {list(shape)} (the adapter was made for another model)"
                )
            infos[part] = (DTYPES[info.dtype], shape)
        return infos

    def read(part: str) -> torch.Tensor:
        return folder.scaled(name, folder.shard.tensor(deltas[part]), kind.axis_of(part))

    def whole(part: str) -> torch.Tensor:
        checkpoint, change = cast(Any, base)
        original = checkpoint.tensor(key_for(f"{name}.{part}", change))
        changes = [(delta.index, read(part), 1.0)]
        return merged_rows(original, torch.arange(num_channels), changes, dim=kind.axis_of(part))

    return ModuleChange(
        name=name,
        kind=kind,
        num_channels=num_channels,
        index=delta.index,
        width=1 if kind.is_norm else delta.weight_shape[1 - dim],
        dtype=dtype if delta.scales is None else wide_dtype(dtype, delta.scales.dtype),
        rows=lambda: _as_rows(read("weight"), kind),
        has_bias=delta.bias is not None,
        bias=None if delta.bias is None else _nonzero(read("bias")),
        whole_infos=whole_infos,
        whole=whole,
    )


def _kind_of_file(where: str, delta: ModuleDelta, recorded: Any) -> ChannelKind:
    """The recorded kind; for adapters of versions that recorded none, the only one that the shapes allow."""
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


def _as_rows(delta: torch.Tensor, kind: ChannelKind) -> torch.Tensor:
    """A delta in the module's own orientation as `[K, I]`."""
    if kind.is_norm:
        return delta.unsqueeze(1)
    return delta.transpose(0, kind.channel_dim)


def _nonzero(delta: torch.Tensor) -> torch.Tensor | None:
    return delta if bool(delta.any()) else None
