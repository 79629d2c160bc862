"""New folders that appear whole or not at all."""

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
except ImportError:  # Windows: what a killed run left behind stays there
    fcntl = None  # type: ignore[assignment]

_OLD = ".old.tmp"  # how the name of a folder ends that is moved away for a moment


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when the block ends, and vanishes if it fails.

    It lies beside `output` under a hidden name, so a run that is killed leaves nothing new under the final name; the
    next run to the same output removes what killed ones left. An older `output` is exchanged for the new one in one
    step on Linux. Where the file system cannot, it is moved away first; what a run killed just then left hidden is
    put back by the next one. Nothing is flushed to the disk: after a power failure look at the result before you use
    it.

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
    """Let two folders change their names."""
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
    """A lock that ends with the process, by which other runs see that the folder is in use."""
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
    """Remove the hidden folders of runs that were killed: nobody holds a lock on those.

    One that was moved away and has nothing in its place goes back there: it is whole.
    """
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
