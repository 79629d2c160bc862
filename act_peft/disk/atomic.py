"""Files and folders that appear whole or not at all.

Both are written in a hidden folder beside the output (`hidden.py`) and renamed at the end. An older folder of the
final name is exchanged for the new one: in one step where the system can, otherwise in three renames. A run that is
killed leaves one of three states. The next run to the same place cleans up:

| state | `output`    | hidden folder | hidden older folder | when             | the next run             |
|-------|-------------|---------------|---------------------|------------------|--------------------------|
| 1     | old or none | new           |                     | before renaming  | removes the new folder   |
| 2     | none        | new           | old                 | after one rename | puts the old folder back |
| 3     | new         | old, or none  | old, or none        | after the next   | removes the old folder   |
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from act_peft.disk.folders import MODEL, FolderKind, check_replaceable
from act_peft.disk.hidden import hidden_folder, lock_of, name_of_older, unlock
from act_peft.disk.renames import exchange, rename_new
from act_peft.errors import ActValueError
from act_peft.interrupts import uninterrupted


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all, as `new_file` does.

    Args:
        path: the file, in an existing folder.
        data: its content.

    Raises:
        OSError: if the system refuses.
    """
    with new_file(path) as beside, open(beside, "xb") as file:
        file.write(data)


@contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """The path of a file to create that becomes `path` when the block ends.

    It is flushed to the disk. The permissions follow the umask. After an error, or Ctrl-C, an older file is unchanged.

    Args:
        path: the file, in an existing folder.
        overwrite: whether an older file is replaced.

    Raises:
        ActValueError: without `overwrite`, if the file exists, at whatever moment it appeared.
        OSError: if the system refuses.
    """
    path = Path(path)
    with hidden_folder(path.parent) as hidden:
        beside = hidden.path / path.name
        yield beside
        os.chmod(beside, 0o600)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(beside, hidden.mode & 0o666)
        if overwrite:
            os.replace(beside, path)
        else:
            try:
                rename_new(beside, path)
            except FileExistsError as error:
                raise _appeared(path, "file") from error


@contextmanager
def new_folder(output: Path, *, overwrite: bool, kind: FolderKind = MODEL) -> Iterator[Path]:
    """A new folder that becomes `output` when the block ends, and is removed if the block fails.

    The permissions follow the umask. Nothing is flushed to the disk: check the result after a power failure.

    Args:
        output: the folder, in an existing folder.
        overwrite: whether an older folder is replaced.
        kind: what an older folder must be.

    Raises:
        ActValueError: if the disk refuses a write; if something exists there that may not be replaced, at whatever
            moment it appeared.
    """
    try:
        with hidden_folder(output.parent) as hidden:
            yield hidden.path
            hidden.honour_umask()
            with uninterrupted():
                _place(hidden.path, output, overwrite=overwrite, kind=kind)
    except (OSError, SafetensorError) as error:  # safetensors' own error of a full disk
        raise ActValueError(
            f"{output}: cannot be written ({error}), nothing was left behind (is there room, may you write here?)"
        ) from error


def _place(new: Path, output: Path, *, overwrite: bool, kind: FolderKind) -> None:
    try:
        rename_new(new, output)
    except FileExistsError as error:
        if not overwrite:
            raise _appeared(output, "folder") from error
        check_replaceable(output, kind)
        _exchange(new, output)


def _appeared(path: Path, what: str) -> ActValueError:
    return ActValueError(
        f"{path}: exists, and did not when this run began, expected a new {what} (nothing was replaced; name a new "
        "one, or pass overwrite=True)"
    )


def _exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders."""
    if exchange(new, old):
        return
    away = name_of_older(new, old)
    lock = None
    with suppress(OSError):
        lock = lock_of(old)
    try:
        os.rename(old, away)
        try:
            os.rename(new, old)
        except BaseException:
            os.rename(away, old)
            raise
        os.rename(away, new)
    finally:
        unlock(lock)
