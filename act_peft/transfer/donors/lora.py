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
from act_peft.patterns import KeyPatterns
from act_peft.transfer.donors.base import OpenDonor

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
# With one of these settings the adapter is more than base + factors.
_UNSUPPORTED = ("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "velora_config")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base
_MORE_PATTERNS = 100  # entries of alpha_pattern beyond one for each module
_MERGE_IT = "merge the adapter with model.merge_and_unload(), save the model and name its folder as donor"


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
        _check_variant(self.location, config)
        self._shard = Shard(place.file(TENSORS))
        try:
            self._modules = self._find_modules(config, base)
            for name, module in self._modules.items():
                if name in axes:
                    self._check_fit(name, module, base, axes[name])
        except BaseException:
            self._shard.close()
            raise

    def close(self) -> None:
        """See `OpenDonor.close`."""
        self._shard.close()

    def _find_modules(self, config: Mapping[str, Any], base: Parameters) -> dict[str, _Module]:
        found: dict[str, dict[str, str]] = {}
        for key in self._shard.tensors:
            name = key.removeprefix(OUTER)
            end = next((end for end in _ENDS if name.endswith(f".{end}")), None)
            if end is None or not key.startswith(OUTER):
                raise ActValueError(
                    f"{self.location}: {key} is no factor of plain LoRA, expected lora_A, lora_B or whole weights "
                    f"({_MERGE_IT})"
                )
            module = name.removesuffix(f".{end}").removesuffix(".base_layer")
            found.setdefault(module, {})[_ENDS[end]] = key
        own_keys = CheckpointKeys(base, [f"{name}.weight" for name in found], fits=partial(self._may_be, found))
        alphas = self._alphas(config, most=len(found) + _MORE_PATTERNS)
        modules = {}
        for name, keys in found.items():
            own = own_keys.own_name(f"{name}.weight").rpartition(".")[0]
            if f"{own}.weight" not in base:
                raise ActLoadError(
                    f"{self.location}: adapts {name}, which the base does not have (the adapter was made for another "
                    "model)"
                )
            if ("a" in keys) != ("b" in keys):
                raise ActLoadError(f"{self.location}: {name} has one factor of two (the file is incomplete)")
            modules[own] = _Module(keys, self._scaling(config, alphas, name, keys))
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

    def _alphas(self, config: Mapping[str, Any], *, most: int) -> KeyPatterns:
        """The keys of `alpha_pattern`."""
        patterns = config.get("alpha_pattern") or {}
        where = f"{self.location}: adapter_config.json: alpha_pattern"
        if not isinstance(patterns, dict):
            raise ActValueError(f"{where} is {str(patterns)[:80]}, expected names of modules with alphas")
        try:
            return KeyPatterns(patterns, most=most)
        except ActValueError as error:
            raise ActValueError(f"{where}: {error}") from error

    def _scaling(self, config: Mapping[str, Any], alphas: KeyPatterns, name: str, keys: Mapping[str, str]) -> float:
        if "a" not in keys:
            return 1.0
        where = f"{self.location}: adapter_config.json"
        key = alphas.first(name)
        alpha: Any = config.get("lora_alpha") if key is None else config["alpha_pattern"][key]
        shape = self._shard.info(keys["a"]).shape
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or not shape or not shape[0]:
            raise ActValueError(
                f"{where}: {name} has lora_alpha {str(alpha)[:40]} and rank {shape[:1]}, expected numbers"
            )
        return alpha / (math.sqrt(shape[0]) if config.get("use_rslora") else shape[0])

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
                f"({_MERGE_IT})"
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


def _check_variant(location: str, config: Mapping[str, Any]) -> None:
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights={start[:40]!r}")
    if config.get("target_parameters"):
        unsupported.append("target_parameters")
    if unsupported:
        raise ActValueError(
            f"{location}: the adapter uses {', '.join(unsupported)}, expected plain LoRA, rsLoRA or DoRA ({_MERGE_IT})"
        )
