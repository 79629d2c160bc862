"""Folders: which files may be read, copies of files, and checks before a new folder is written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from act_peft.errors import ActValueError


def file_in(folder: Path, name: str) -> Path:
    """The real path of a file of a folder.

    Links may lead to the same folder or, from a snapshot of the Hub's cache, to the `blobs` of the cache.

    Raises:
        ActValueError: if there is no such file, it is a folder or a pipe, or it lies outside the folder.
    """
    root = folder.resolve()
    try:
        real = (folder / name).resolve(strict=True)
        is_file = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # missing, a loop of links, a zero byte in the name
        raise ActValueError(f"{folder / name}: no such file, expected one ({error})") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ActValueError(
            f"{folder / name}: leads to {real}, expected a file inside {root} (copy the file into the folder)"
        )
    if not is_file:
        raise ActValueError(f"{folder / name}: is no regular file, expected one")
    return real


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a new one: in the kernel where possible, and on shared disk space where the system can."""
    with open(source, "rb", buffering=0) as a, open(target, "xb", buffering=0) as b:
        left = os.fstat(a.fileno()).st_size
        while left > 0 and hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(a.fileno(), b.fileno(), left)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                break
            if copied == 0:
                break
            left -= copied
        shutil.copyfileobj(a, b, 1 << 20)


@dataclass(frozen=True)
class FolderKind:
    """What a folder that may be replaced is.

    Attributes:
        name: for messages, "a model".
        files: names of files, one of which it has.
    """

    name: str
    files: frozenset[str]


MODEL = FolderKind("a model", frozenset({"config.json", "adapter_config.json"}))


def check_output(output: Path, inputs: Iterable[Path], *, overwrite: bool, kind: FolderKind = MODEL) -> None:
    """Check that a new folder may be written.

    Raises:
        ActValueError: if the output lies in an input or holds one, its parent folder does not exist, or the output
            exists and must not be overwritten or is of another kind.
    """
    if not output.parent.is_dir():
        raise ActValueError(f"{output}: folder {output.parent} does not exist, expected an existing one (create it)")
    real = output.resolve()
    for folder in inputs:
        other = folder.resolve()
        if real.is_relative_to(other) or other.is_relative_to(real):
            raise ActValueError(
                f"{output}: is, lies in or holds the input {folder}, expected a folder outside it (name a new one)"
            )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ActValueError(f"{output}: exists, expected a new folder (name a new one, or pass overwrite=True)")
    check_replaceable(output, kind)


def check_replaceable(output: Path, kind: FolderKind) -> None:
    """Check that what exists at `output` may be replaced.

    Raises:
        ActValueError: if it is neither an empty folder nor one of this kind.
    """
    names = os.listdir(output) if output.is_dir() and not output.is_symlink() else None
    if names is None or (names and not kind.files & set(names)):
        raise ActValueError(f"{output}: is no folder of {kind.name}, expected one to overwrite (remove it yourself)")


def check_room(output: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes.

    Raises:
        ActValueError: if there is less.
    """
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ActValueError(
            f"{output}: the disk has {free / 1e9:.2f} GB free, expected at least {needed / 1e9:.2f} GB (make room, or "
            "write to a different disk)"
        )
