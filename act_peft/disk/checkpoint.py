"""The one reader of checkpoints on disk: a folder or Hub id with one or several safetensors files."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from act_peft.disk.folders import file_in
from act_peft.disk.json_text import parse_json
from act_peft.disk.locations import Location, open_location
from act_peft.disk.quantization import quantization_method, quantized_weight
from act_peft.disk.shard import Shard, TensorInfo
from act_peft.errors import ActValueError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The files of a model without its weights: configuration, tokenizer, chat template, code, licence.
SMALL_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
_LEFT_OUT = ("*.index.json", "trainer_state.json", "adapter_config.json", "all_results.json", "*_results.json")
_TEMPLATES = "additional_chat_templates"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint:
    """A checkpoint on disk, open for reading; a context manager and a `TensorSource`.

    Files on the Hub are downloaded one by one, when they are first needed. Every tensor that it returns is a copy.

    Args:
        place: the opened folder, see `Checkpoint.open`.

    Attributes:
        location: the folder or Hub id that the user gave.
        folder: the local folder.
        remembered: what has been found out about the checkpoint, kept as long as it is.
    """

    def __init__(self, place: Location) -> None:
        self.location = place.name
        self.folder = place.folder
        self._place = place
        self.remembered: dict[str, object] = {}
        self._shards: dict[str, Shard] = {}
        self._file_of = self._find_tensors()

    @classmethod
    def open(cls, location: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
        """Open a checkpoint.

        Args:
            location: a folder or a Hub id.
            revision: revision on the Hub; ignored for a folder.

        Raises:
            ActValueError: if there is nothing, or only pickled weights; for a missing or damaged file, or a link out
                of the folder.
        """
        return cls(open_location(location, expected="a checkpoint", files=SMALL_FILES, revision=revision))

    def close(self) -> None:
        """Close all files; closing twice is harmless."""
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    @property
    def names(self) -> Sequence[str]:
        """The keys of all tensors."""
        return tuple(self._file_of)

    @property
    def files(self) -> Sequence[str]:
        """The names of the files that hold the tensors, sorted."""
        return tuple(sorted(set(self._file_of.values())))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`, read-only.

        Raises:
            ActValueError: if there is no such file, or it holds no JSON object.
        """
        return MappingProxyType(read_json(self.folder, "config.json", finite=False))

    @property
    def quantization(self) -> str | None:
        """The method that the model is quantized with, by `config.json`; None also without this file."""
        has_config = os.path.lexists(self.folder / "config.json")
        return quantization_method(self.config) if has_config else None

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor.

        Raises:
            ActValueError: if there is no such tensor.
        """
        if name not in self._file_of and self.quantization is not None:
            raise quantized_weight(self.location, name, self.quantization)
        if name not in self._file_of:
            raise ActValueError(
                f"{self.location}: {name} is missing in the checkpoint, expected it among its {len(self._file_of)} "
                "tensors (the checkpoint is incomplete, or of a different model; if transformers loads it only "
                "with key_mapping, load it so and save it with save_pretrained(folder, save_original_format=False))"
            )
        return self._file_of[name]

    def shard(self, file: str) -> Shard:
        """One of `files`, opened on first use and downloaded where needed.

        Raises:
            ActValueError: if it is missing, damaged, or lies outside the folder.
        """
        if file not in self._shards:
            self._shards[file] = Shard(self._place.file(file))
        return self._shards[file]

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and position of a tensor.

        Raises:
            ActValueError: if there is no such tensor, or its file is missing or damaged.
        """
        return self.shard(self.file_of(name)).info(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.shard(self.file_of(name)).dtype(name)

    def rows(self, name: str, index: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """A copy of rows (`dim` 0) or columns (`dim` 1) of a tensor; `index` is int64 `[K]`, ascending.

        Raises:
            ActValueError, ActTypeError: as `Shard.rows`.
        """
        return self.shard(self.file_of(name)).rows(name, index, dim)

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of a whole tensor."""
        return self.shard(self.file_of(name)).tensor(name)

    def _find_tensors(self) -> dict[str, str]:
        """Key -> name of the file that holds it."""
        if self._place.is_local and os.path.lexists(self.folder / SINGLE):
            return dict.fromkeys(self.shard(SINGLE).tensors, SINGLE)
        if os.path.lexists(self.folder / INDEX):
            table = read_json(self.folder, INDEX).get("weight_map")
            if not isinstance(table, dict) or not all(_is_shard_name(file) for file in table.values()):
                raise ActValueError(
                    f"{self.folder / INDEX}: weight_map is {str(table)[:80]}, expected names of tensors with the "
                    "names of safetensors files (the index is damaged)"
                )
            if self._place.is_local:
                for file in sorted(set(table.values())):
                    if not os.path.lexists(self.folder / file):
                        raise ActValueError(
                            f"{self.folder / INDEX}: names {file}, which is missing in the folder (the checkpoint is "
                            "incomplete; copy or download it again)"
                        )
            return dict(table)
        if not self._place.is_local:
            return dict.fromkeys(self.shard(SINGLE).tensors, SINGLE)
        pickled = sorted(file for file in os.listdir(self.folder) if file.endswith(_PICKLED))
        if pickled:
            raise ActValueError(
                f"{self.location}: got pickled weights ({pickled[0]}), expected safetensors (load the model with "
                "transformers where you trust it, and write it with model.save_pretrained(folder))"
            )
        raise ActValueError(
            f"{self.location}: has neither {SINGLE} nor {INDEX}, expected a folder with a checkpoint (cannot be "
            "opened)"
        )


def read_json(folder: Path, name: str, *, finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file of a folder.

    Args:
        folder: the folder.
        name: the file in it.
        finite: whether numbers must be finite.

    Raises:
        ActValueError: if there is no such file, it cannot be read, or it is no JSON object.
    """
    try:
        content = file_in(folder, name).read_bytes()
    except OSError as error:
        raise ActValueError(f"{folder / name}: cannot be read ({error.strerror}), expected a JSON file") from error
    return parse_json(content, str(folder / name), finite=finite)


def _is_shard_name(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and os.path.basename(file) == file


def small_files(folder: Path) -> list[str]:
    """The names of a model's files without its weights."""
    names = sorted(os.listdir(folder))
    small = [n for n in names if n == INDEX or (_is_like(n, SMALL_FILES) and not _is_like(n, _LEFT_OUT))]
    if (folder / _TEMPLATES).is_dir():
        small += [f"{_TEMPLATES}/{n}" for n in sorted(os.listdir(folder / _TEMPLATES)) if n.endswith(".jinja")]
    return small


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
