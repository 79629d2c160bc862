"""Files and folders that appear whole or not at all.

Both are written under a hidden name in the same folder and renamed at the end. An older folder of the final name is
exchanged for the new one: in one step where the system can, otherwise in three renames. A run that is killed leaves
one of three states. The next run to the same output cleans up:

| state | `output`   | `.output.*.tmp` | `.output.*.old.tmp` | when              | the next run             |
|-------|------------|-----------------|---------------------|-------------------|--------------------------|
| 1     | old or none| new             |                     | before renaming   | removes the new folder   |
| 2     | none       | new             | old                 | after one rename  | puts the old folder back |
| 3     | new        | old, or none    | old, or none        | after the next    | removes the old folder   |

A run locks its hidden folder, so that a different run does not take it for a leftover.
"""

from __future__ import annotations

import ctypes
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from act_peft.errors import ActValueError

try:
    import fcntl
except ImportError:  # Windows: the folders of killed runs stay there
    fcntl = None  # type: ignore[assignment]

_OLD = ".old.tmp"  # suffix of a folder that is moved away temporarily


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
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a file to create that becomes `path` when the block ends, over an older file if there is one.

    It is flushed to the disk. The permissions follow the umask. After an error, or Ctrl-C, the older file is
    unchanged.

    Args:
        path: the file, in an existing folder.

    Raises:
        OSError: if the system refuses.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new folder that becomes `output` when the block ends, and is removed if the block fails.

    An older `output` is replaced. Nothing is flushed to the disk: check the result after a power failure.

    Raises:
        ActValueError: if the disk refuses a write.
    """
    stem = f".{output.name}."
    beside = output.parent / f"{stem}{secrets.token_hex(8)}.tmp"
    try:
        _clear_leftovers(output, stem)
        beside.mkdir()
        with _locked(beside):
            yield beside
            if os.path.lexists(output):
                _exchange(beside, output)
            else:
                os.rename(beside, output)
    except OSError as error:
        raise ActValueError(
            f"{output}: cannot be written ({error}), nothing was left behind (is there room, may you write here?)"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders."""
    if _exchange_at_once(new, old):
        return
    away = new.with_suffix(_OLD)
    with _locked(old):
        os.rename(old, away)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(away, old)
            raise
        os.rename(away, new)


def _exchange_at_once(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system has no such step."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE in linux/fcntl.h and linux/fs.h
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which shows other runs that it is in use. The lock ends with the process."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _clear_leftovers(output: Path, stem: str) -> None:
    """Remove the hidden folders that nobody holds a lock on; see the table above."""
    if fcntl is None:
        return
    for path in output.parent.glob(f"{glob.escape(stem)}{'[0-9a-f]' * 16}*.tmp"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name.endswith(_OLD) and not os.path.lexists(output):
                os.rename(path, output)
            else:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)
