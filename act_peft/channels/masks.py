"""The selected channels of every module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from act_peft.channels.origin import HasOrigin, Origin, join
from act_peft.checks import MOST, module_name, whole_number
from act_peft.disk import tensorfile
from act_peft.errors import ActError, ActTypeError, ActValueError

_KIND = "channel mask"
_PLAIN_VERSION, _VERSION = 1, 2  # version 2 has the origin, and is written only where it is known


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ChannelMask(HasOrigin, Mapping[str, torch.Tensor]):
    """An immutable set of channels of one model: module name -> sorted unique int64 tensor `[K]` on the CPU.

    The mapping holds every candidate module in the model's order, also those without a selected channel (K = 0), and
    the number of channels of each. Every access returns a copy.

    `a | b`, `a & b` and `a - b` are the set operations. The two masks may cover different candidate modules of the
    same model; the result covers the modules of both. For a module in both masks the numbers of channels must agree.

    Args:
        channels: module name -> channels, as a sequence of ints or an integer tensor, in any order.
        num_channels: module name -> number of channels C, for every candidate module. Modules without
            an entry in `channels` have no selected channel.

    Raises:
        ActTypeError: names that are no str, indices that are no flat collection of integers, counts that are no int.
        ActValueError: a negative, repeated or out-of-range index, a module without an entry in `num_channels`.

    Example:
        >>> mask = ChannelMask({"q_proj": [2, 0]}, num_channels={"q_proj": 4, "up_proj": 8})
        >>> mask["q_proj"]
        tensor([0, 2])
        >>> (mask | ChannelMask({"up_proj": [1]}, mask.num_channels)).num_selected
        3
    """

    _channels: dict[str, torch.Tensor]
    _num_channels: dict[str, int]

    def __init__(self, channels: Mapping[str, Iterable[int] | torch.Tensor], num_channels: Mapping[str, int]) -> None:
        counts = {
            module_name(name): whole_number(count, f"{name}: number of channels", least=1, most=MOST)
            for name, count in num_channels.items()
        }
        missing = [name for name in channels if name not in counts]
        if missing:
            raise ActValueError(
                f"{missing[0]}: has no entry in num_channels, expected one for every module "
                f"({len(missing)} of {len(channels)} modules have none)"
            )
        object.__setattr__(self, "_num_channels", counts)
        object.__setattr__(
            self,
            "_channels",
            {name: checked_indices(name, channels.get(name, ()), count) for name, count in counts.items()},
        )

    @classmethod
    def from_dict(
        cls, channels: Mapping[str, Iterable[int] | torch.Tensor], num_channels: Mapping[str, int]
    ) -> ChannelMask:
        """Build a mask from plain data; arguments and errors are those of the class."""
        return cls(channels, num_channels)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._channels[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)

    def __contains__(self, name: object) -> bool:
        return name in self._channels

    def __repr__(self) -> str:
        touched = sum(index.numel() > 0 for index in self._channels.values())
        return (
            f"ChannelMask({self.num_selected} of {sum(self._num_channels.values())} channels "
            f"in {touched} of {len(self)} modules, density {self.density:.4g})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelMask):
            return NotImplemented
        return self._num_channels == other._num_channels and all(
            torch.equal(index, other._channels[name]) for name, index in self._channels.items()
        )

    def __or__(self, other: ChannelMask) -> ChannelMask:
        return self._combined(other, lambda a, b: torch.cat((a, b[~torch.isin(b, a)])))

    def __and__(self, other: ChannelMask) -> ChannelMask:
        return self._combined(other, lambda a, b: a[torch.isin(a, b)])

    def __sub__(self, other: ChannelMask) -> ChannelMask:
        return self._combined(other, lambda a, b: a[~torch.isin(a, b)])

    @property
    def num_channels(self) -> Mapping[str, int]:
        """Module name -> number of channels C, for every candidate module; read-only."""
        return MappingProxyType(self._num_channels)

    @property
    def num_selected(self) -> int:
        """Number of selected channels over all modules."""
        return sum(index.numel() for index in self._channels.values())

    @property
    def density(self) -> float:
        """Selected channels / all candidate channels, from 0 to 1; 0 for a mask without modules."""
        return self.num_selected / max(sum(self._num_channels.values()), 1)

    def jaccard(self, other: ChannelMask) -> float:
        """Overlap of two masks: `|a & b| / |a | b|`, from 0 (disjoint) to 1 (equal); 1 for two empty masks.

        Raises:
            ActTypeError: `other` is not a mask.
            ActValueError: the masks disagree on a module's number of channels.
        """
        if not isinstance(other, ChannelMask):
            raise ActTypeError(f"jaccard: got {type(other).__name__}, expected a ChannelMask")
        union = (self | other).num_selected
        return (self & other).num_selected / union if union else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to one safetensors file, whole or not at all.

        Layout: one int64 tensor `[K]` per module under the module's name, and in the metadata
        `modules: [[name, number of channels], ...]` in order. Version 2, where the origin is known, adds `origin:
        {base, donor}`, each with `name` and `fingerprints: {module: hash}`.

        Raises:
            ActValueError: `path` is a folder or lies in a folder that does not exist.
        """
        metadata: dict[str, Any] = {"modules": [[name, count] for name, count in self._num_channels.items()]}
        version = _PLAIN_VERSION
        if self._origin is not None:
            version = _VERSION
            metadata |= {"origin": self._origin.to_json()}
        tensorfile.write(path, _KIND, version, self._channels, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelMask:
        """Read a mask that `save` wrote.

        Raises:
            ActValueError: the file is missing, damaged, not a mask, or of a newer version.
        """
        tensors, metadata = tensorfile.read(path, _KIND, _VERSION)
        modules = metadata.get("modules")
        if not isinstance(modules, list) or not all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in modules
        ):
            raise ActValueError(f"{path}: metadata has no list of modules with their channels (save the mask again)")
        num_channels = dict(modules)
        if len(modules) != len(num_channels) or tensors.keys() != num_channels.keys():
            raise ActValueError(
                f"{path}: got tensors for {len(tensors)} modules, expected exactly the {len(modules)} modules that "
                "its metadata lists (save the mask again)"
            )
        try:
            mask = cls(tensors, num_channels)
            if "origin" in metadata:
                mask = mask.with_origin(Origin.from_json(metadata["origin"]))
        except ActError as error:
            raise ActValueError(f"{path}: {error}") from error
        for name, index in tensors.items():
            if index.dtype != torch.int64 or not torch.equal(index, mask._channels[name]):
                raise ActValueError(
                    f"{path}: {name}: got unsorted or {index.dtype} indices, expected sorted torch.int64 "
                    "(save the mask again)"
                )
        return mask

    def _combined(
        self, other: ChannelMask, operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> ChannelMask:
        if not isinstance(other, ChannelMask):
            return NotImplemented
        left, right = self._num_channels, other._num_channels
        conflicts = [name for name in left if name in right and left[name] != right[name]]
        if conflicts:
            name = conflicts[0]
            raise ActValueError(
                f"{name}: got {left[name]} channels in one mask and {right[name]} in the other, expected two masks of "
                f"the same model ({len(conflicts)} of {len(left.keys() & right.keys())} common modules differ)"
            )
        nothing = torch.empty(0, dtype=torch.int64)
        counts = {**left, **right}
        return ChannelMask(
            {
                name: operation(self._channels.get(name, nothing), other._channels.get(name, nothing))
                for name in counts
            },
            counts,
        ).with_origin(join(self._origin, other._origin))


def checked_indices(name: str, channels: Iterable[int] | torch.Tensor, count: int | None = None) -> torch.Tensor:
    """A sorted int64 copy `[K]` of one module's channels.

    Args:
        name: the module, for messages.
        channels: the channels in any order.
        count: the module's number of channels C; None where it is still unknown.

    Raises:
        ActTypeError: not a flat collection of integers.
        ActValueError: a negative, repeated or (with `count`) too large index.
    """
    try:
        index = channels if isinstance(channels, torch.Tensor) else _as_tensor(channels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ActTypeError(f"{name}: got {channels!r:.200}, expected a flat collection of ints ({error})") from error
    if index.dim() != 1:
        raise ActTypeError(f"{name}: got channels of shape {list(index.shape)}, expected [K]")
    if index.dtype == torch.bool:
        raise ActTypeError(f"{name}: got torch.bool, expected integer indices (pass `flags.nonzero().flatten()`)")
    if index.is_floating_point() or index.is_complex():
        raise ActTypeError(f"{name}: got {index.dtype}, expected integer indices")
    index = index.detach().to(device="cpu", dtype=torch.int64, copy=True).sort().values
    if index.numel() == 0:
        return index
    if count is None:
        if index[0] < 0:
            raise ActValueError(f"{name}: got channel {int(index[0])}, expected 0 or more")
    elif index[0] < 0 or index[-1] >= count:
        wrong = int(index[0] if index[0] < 0 else index[-1])
        raise ActValueError(
            f"{name}: got channel {wrong}, expected 0 to {count - 1} (the module has {count} channels)"
        )
    repeated = index[1:][index[1:] == index[:-1]]
    if repeated.numel():
        raise ActValueError(f"{name}: got channel {int(repeated[0])} more than once, expected unique channels")
    return index


def _as_tensor(channels: Iterable[int]) -> torch.Tensor:
    values = list(channels)
    return torch.as_tensor(values) if values else torch.empty(0, dtype=torch.int64)
