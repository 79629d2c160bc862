"""The folder of a saved ACT adapter, read without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from act_peft.checkpoint import read_json
from act_peft.errors import ActLoadError, ActValueError
from act_peft.folders import file_in
from act_peft.shards import Shard

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_OUTER = "base_model.model."
_PARTS = ("act_delta_index", "act_delta_weight", "act_delta_bias")


@dataclass(frozen=True)
class ModuleDelta:
    """What an adapter holds for one module: channels int64 `[K]`, ascending, and where its deltas are."""

    index: torch.Tensor
    weight: str
    weight_shape: tuple[int, ...]
    bias: str | None


class AdapterFolder:
    """A saved ACT adapter, open for reading; a context manager.

    Args:
        location: a folder or Hub id.

    Attributes:
        location: what the user named.
        folder: the local folder.
        config: what `adapter_config.json` says.
        modules: module name -> `ModuleDelta`.

    Raises:
        ActValueError: no such adapter, a damaged file, an adapter of another method.
        ActLoadError: tensors that no ACT adapter has.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        self.folder = _local_folder(self.location)
        self.config = read_json(self.folder, CONFIG)
        if self.config.get("peft_type") != "ACT":
            raise ActValueError(
                f"{self.location}: got an adapter of type {str(self.config.get('peft_type'))[:40]}, expected ACT "
                "(merge other adapters with PEFT)"
            )
        recorded = self.config.get("adapted_modules") or {}
        self._recorded: Mapping[str, Any] = recorded if isinstance(recorded, dict) else {}
        self.shard = Shard(file_in(self.folder, TENSORS))
        try:
            self.modules = self._read_modules()
        except BaseException:
            self.shard.close()
            raise

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self.shard.close()

    def __enter__(self) -> AdapterFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def recorded_base(self, module: str) -> str | None:
        """Fingerprint of the base rows of a module that the adapter was made for, if it recorded one."""
        entry = self._recorded.get(module)
        found = entry.get("base") if isinstance(entry, dict) else None
        return found if isinstance(found, str) else None

    def _read_modules(self) -> dict[str, ModuleDelta]:
        parts: dict[str, dict[str, str]] = {}
        for key in self.shard.tensors:
            module, _, part = key.removeprefix(_OUTER).rpartition(".")
            if part not in _PARTS or not module or not key.startswith(_OUTER):
                raise ActLoadError(
                    f"{self.location}: {key}: got a tensor that is no channel delta, expected only "
                    f"{', '.join(_PARTS)} (modules_to_save and trainable tokens have to be merged in memory, with "
                    "model.merge_and_unload())"
                )
            parts.setdefault(module, {})[part] = key
        return {module: self._read_module(module, keys) for module, keys in parts.items()}

    def _read_module(self, module: str, keys: Mapping[str, str]) -> ModuleDelta:
        where = f"{self.location}: {module}"
        missing = [part for part in _PARTS[:2] if part not in keys]
        if missing:
            raise ActLoadError(f"{where}: the adapter has no {missing[0]}, expected one (the file is incomplete)")
        info = self.shard.info(keys["act_delta_index"])
        if info.dtype != "I64" or len(info.shape) != 1:
            raise ActLoadError(
                f"{where}: channel indices are {info.dtype} of shape {list(info.shape)}, expected I64 of shape [K]"
            )
        index = self.shard.tensor(keys["act_delta_index"])
        if index.numel() and (int(index[0]) < 0 or not bool((index[1:] > index[:-1]).all())):
            raise ActLoadError(
                f"{where}: channel indices from {int(index.min())} to {int(index.max())}, expected ascending ones "
                "from 0 on without repetition (the file is damaged)"
            )
        weight = self.shard.info(keys["act_delta_weight"])
        bias = self.shard.info(keys["act_delta_bias"]) if "act_delta_bias" in keys else None
        for part, tensor in (("act_delta_weight", weight), ("act_delta_bias", bias)):
            if tensor is not None and not tensor.is_plain:
                raise ActLoadError(f"{where}: {part} is {tensor.dtype}, expected a floating point dtype")
        if bias is not None and bias.shape != tuple(index.shape):
            raise ActLoadError(f"{where}: act_delta_bias has {list(bias.shape)}, expected {list(index.shape)}")
        return ModuleDelta(index, keys["act_delta_weight"], weight.shape, keys.get("act_delta_bias"))


def _local_folder(location: str) -> Path:
    if os.path.isdir(location):
        return Path(location)
    if os.path.lexists(location):
        raise ActValueError(f"{location}: got a file, expected the adapter's folder (with {CONFIG})")
    try:
        return Path(snapshot_download(location, allow_patterns=[CONFIG, TENSORS]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ActValueError(
            f"{location}: no such adapter, expected a folder or a Hub id ({str(error)[:200]})"
        ) from error
