"""A LoRA adapter as donor: the base with this adapter, computed only for the selected channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from act_peft.adapter.file import TENSORS
from act_peft.channels.rows import wide_dtype
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.locations import Location
from act_peft.disk.parameters import Parameters
from act_peft.disk.shard import Shard
from act_peft.doors import OUTER
from act_peft.errors import ActLoadError, ActValueError
from act_peft.transfer.donors.base import OpenDonor
from act_peft.transfer.donors.lora_settings import MERGE_IT, lora_settings

# End of a key that PEFT writes -> its name here. `weight` and `bias` are whole parameters.
_ENDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "weight": "weight",
    "bias": "bias",
}


@dataclass(frozen=True)
class _Module:
    """Keys of one module's tensors, and the factor of `b @ a`."""

    keys: Mapping[str, str]
    scaling: float


class LoraDonor(OpenDonor):
    """The difference of a channel is a row of the product of the factors.

        delta W[i, :] = alpha / r * B[i, :] A          (alpha / sqrt(r) with rank-stabilised LoRA)

    With DoRA the row of W + delta W is rescaled to its learned magnitude. Modules that the adapter saves as a whole
    are read by row.

    Args:
        place: the adapter's folder.
        config: the content of its `adapter_config.json`.
        base: the parameters of the base.
        axes: module -> axis of its channels, for the modules that will be read.

    Raises:
        ActValueError: a variant of LoRA without such rows; a damaged file or configuration.
        ActLoadError: the adapter does not fit the base.
    """

    def __init__(
        self, place: Location, config: Mapping[str, Any], base: Parameters, *, axes: Mapping[str, int]
    ) -> None:
        self.location = place.name
        self.notes = []
        self._shard = Shard(place.file(TENSORS))
        try:
            self._settings = lora_settings(self.location, config, most_patterns=len(self._shard.tensors))
            self._modules = self._find_modules(base)
            for name, module in self._modules.items():
                if name in axes:
                    self._check_fit(name, module, base, axes[name])
        except BaseException:
            self._shard.close()
            raise

    def close(self) -> None:
        """See `OpenDonor.close`."""
        self._shard.close()

    def _find_modules(self, base: Parameters) -> dict[str, _Module]:
        found: dict[str, dict[str, str]] = {}
        for key in self._shard.tensors:
            name = key.removeprefix(OUTER)
            end = next((end for end in _ENDS if name.endswith(f".{end}")), None)
            if end is None or not key.startswith(OUTER):
                raise ActValueError(
                    f"{self.location}: {key} is no factor of plain LoRA, expected lora_A, lora_B or whole weights "
                    f"({MERGE_IT})"
                )
            module = name.removesuffix(f".{end}").removesuffix(".base_layer")
            found.setdefault(module, {})[_ENDS[end]] = key
        own_keys = CheckpointKeys(base, [f"{name}.weight" for name in found], fits=partial(self._may_be, found))
        modules = {}
        for name, keys in found.items():
            own = own_keys.own_name(f"{name}.weight").rpartition(".")[0]
            if f"{own}.weight" not in base:
                raise ActLoadError(
                    f"{self.location}: adapts {name}, which the base does not have (the adapter was made for another "
                    "model)"
                )
            self._settings.check_parts(name, keys, has_bias=f"{own}.bias" in base)
            modules[own] = _Module(keys, self._scaling(name, keys))
        self._settings.check_modules({own: module.keys for own, module in modules.items()}, base.names)
        return modules

    def _may_be(self, found: Mapping[str, Mapping[str, str]], parameter: str, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can be one that the adapter's factors were made for."""
        keys = found.get(parameter.rpartition(".")[0], {})
        if "a" not in keys or "b" not in keys:
            return True
        a, b = (
            self._shard.info(keys[part]).shape for part in ("a", "b")
        )  # [r, I], [O, r]; their sizes may be swapped
        return len(a) == len(b) == len(shape) == 2 and {a[1], b[0]} == set(shape)

    def _scaling(self, name: str, keys: Mapping[str, str]) -> float:
        if "a" not in keys:
            return 1.0
        rank, alpha = self._settings.rank_and_alpha(name)
        shape = self._shard.info(keys["a"]).shape
        if shape[:1] != (rank,):
            raise ActLoadError(
                f"{self.location}: {name} has factors of rank {list(shape[:1])}, expected {rank} by its "
                "adapter_config.json (the file belongs to a different configuration)"
            )
        return alpha / (math.sqrt(rank) if self._settings.use_rslora else rank)

    def _check_fit(self, name: str, module: _Module, base: Parameters, dim: int) -> None:
        shape = base.shape(f"{name}.weight")
        channels = shape[dim]
        expected = {"weight": shape, "bias": (channels,), "b_bias": (channels,)}
        if "a" in module.keys:
            rank = self._shard.info(module.keys["a"]).shape[0]
            expected |= {"a": (rank, shape[1 - dim] if len(shape) == 2 else 0), "b": (channels, rank)}
        for part, key in module.keys.items():
            info = self._shard.info(key)
            if part == "magnitude":
                fits = math.prod(info.shape) == channels and len(shape) == 2
            else:
                fits = info.shape == expected[part]
            if not fits or not info.is_plain:
                raise ActLoadError(
                    f"{name}: the donor {self.location} has {key} {info.dtype} {list(info.shape)}, which does not fit "
                    f"the base's weight {list(shape)} (the adapter was made for another model)"
                )
        if "magnitude" in module.keys and self._shard.info(module.keys["a"]).shape[1] != shape[1]:
            raise ActValueError(
                f"{name}: the donor {self.location} uses DoRA on a module whose channels are columns, expected rows "
                f"({MERGE_IT})"
            )

    def difference(self, module: str, part: str, index: torch.Tensor, dim: int, base: torch.Tensor) -> torch.Tensor:
        """See `OpenDonor.difference`."""
        difference = torch.zeros_like(base, dtype=wide_dtype(base.dtype))
        if module not in self._modules:
            return difference
        keys, scaling = self._modules[module].keys, self._modules[module].scaling
        if part in keys:
            difference += self._shard.rows(keys[part], index, dim).to(difference) - base.to(difference)
        if part == "bias" and "b_bias" in keys:
            difference += scaling * self._shard.rows(keys["b_bias"], index).to(difference)
        if part == "weight" and "a" in keys:
            b = self._shard.rows(keys["b"], index).to(difference)  # [K, r]
            rows = scaling * (b @ self._shard.tensor(keys["a"]).to(difference))  # [K, I]
            difference += rows if dim == 0 else rows.T
            if "magnitude" in keys:
                adapted = base.to(difference) + difference  # [K, I]
                magnitude = self._shard.tensor(keys["magnitude"]).flatten()[index].to(difference)  # [K]
                difference = adapted * (magnitude / adapted.norm(dim=1)).unsqueeze(1) - base.to(difference)
        return difference
