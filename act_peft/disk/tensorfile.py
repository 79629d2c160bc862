"""Files of named tensors with a kind and a version.

A file is a plain safetensors file. Its safetensors metadata has the single key `act_peft`. The value is one JSON
object with sorted keys: `kind` (str), `version` (int, from 1) and `metadata` (object, defined by the kind). Equal
content gives equal bytes. Reading never unpickles anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from act_peft.disk.atomic import new_file, write_file
from act_peft.disk.json_text import parse_json
from act_peft.disk.shard import Shard
from act_peft.disk.writing import write_tensors
from act_peft.errors import ActValueError

_METADATA_KEY = "act_peft"


def write(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write tensors to a file, as `write_file` does.

    Args:
        path: the file to write, in an existing folder.
        kind: kind of the content; `read` must ask for the same kind.
        version: version of the layout of this kind, from 1.
        tensors: any shapes, dtypes and devices.
        metadata: JSON-serialisable; finite numbers only.

    Raises:
        ActValueError: if `path` is a folder, or its folder does not exist.
    """
    header = _checked_header(Path(path), kind, version, metadata)
    # safetensors refuses tensors that share memory.
    copies = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    write_file(path, serialize(copies, metadata={_METADATA_KEY: header}))


def write_large(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """As `write`, but tensor by tensor: what is written is not in memory a second time.

    Raises:
        ActValueError: if `path` is a folder, or its folder does not exist.
    """
    header = _checked_header(Path(path), kind, version, metadata)
    # Wide dtypes first, so that every tensor begins at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    infos = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with new_file(path) as beside:
        write_tensors(
            beside, infos, (tensors[name].detach().cpu() for name in names), metadata={_METADATA_KEY: header}
        )


def read(path: str | os.PathLike[str], kind: str, version: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file that `write` made. Everything is checked that does not depend on the kind.

    Args:
        path: the file.
        kind: the expected kind.
        version: the newest version of that kind that the caller can read.

    Returns:
        The tensors (copies on the CPU, independent of the file) in the order of their names, and the kind's metadata.

    Raises:
        ActValueError: if there is no such file, it is a folder, damaged or no safetensors file, or of a different kind
            or a newer version.
    """
    with _opened(Path(path), f"a file of kind {kind!r}") as (shard, header):
        _check_header(Path(path), header, kind, version)
        tensors = {name: shard.tensor(name) for name in sorted(shard.names)}
    return tensors, header["metadata"]


def _checked_header(path: Path, kind: str, version: int, metadata: Mapping[str, Any]) -> str:
    """The text of the metadata, after a look at where the file is to be written."""
    if path.is_dir():
        raise ActValueError(f"{path}: got a folder, expected the name of a file to write (append a file name)")
    if not path.parent.is_dir():
        raise ActValueError(f"{path}: folder {path.parent} does not exist, expected an existing one (create it first)")
    return json.dumps(
        {"kind": kind, "version": version, "metadata": metadata},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of a file that `write` made.

    Args:
        path: the file.

    Raises:
        ActValueError: if there is no such file, or it is a folder, damaged or no safetensors file.
    """
    with _opened(Path(path), "a file that act_peft saved") as (_, header):
        return header["kind"]


def metadata_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a file that `write` made, as it is.

    Args:
        path: the file.

    Raises:
        ActValueError: as `kind_of`.
    """
    with _opened(Path(path), "a file that act_peft saved") as (_, header):
        return header["metadata"]


@contextmanager
def _opened(path: Path, expected: str) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """The open file and its checked header."""
    if path.is_dir():
        raise ActValueError(f"{path}: got a folder, expected a file (name the file inside it)")
    if not path.is_file():
        raise ActValueError(f"{path}: no such file, expected {expected} (check the path)")
    if path.stat().st_size == 0:  # mapping an empty file is a different error on every system
        raise ActValueError(f"{path}: got an empty file, expected a safetensors file (save it again)")
    with Shard(path) as shard:
        yield shard, _parse_header(path, shard.metadata)


def _parse_header(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    text = metadata.get(_METADATA_KEY)
    if not isinstance(text, str):
        raise ActValueError(
            f"{path}: got a safetensors file without {_METADATA_KEY!r} metadata, expected a file that act_peft saved "
            "(is it a checkpoint?)"
        )
    header = parse_json(text, f"{path}: {_METADATA_KEY!r} metadata")
    if (
        not isinstance(header.get("kind"), str)
        or type(header.get("version")) is not int
        or not isinstance(header.get("metadata"), dict)
    ):
        raise ActValueError(
            f"{path}: {_METADATA_KEY!r} metadata is {text[:200]}, expected an object with kind, version and metadata "
            "(save the file again)"
        )
    return header


def _check_header(path: Path, header: dict[str, Any], kind: str, version: int) -> None:
    if header["kind"] != kind:
        raise ActValueError(f"{path}: got a file of kind {header['kind']!r}, expected {kind!r} (wrong file?)")
    if header["version"] > version:
        raise ActValueError(
            f"{path}: got version {header['version']} of kind {kind!r}, expected at most {version} (upgrade act_peft)"
        )
    if header["version"] < 1:
        raise ActValueError(
            f"{path}: got version {header['version']} of kind {kind!r}, expected 1 to {version} (save the file again)"
        )
