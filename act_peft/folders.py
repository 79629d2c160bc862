"""Folders: files that may be read from one, copies of files, and new folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from act_peft.errors import ActValueError

try:
    import fcntl
except ImportError:  # Windows: what a killed run left behind stays there
    fcntl = None  # type: ignore[assignment]

_OLD = ".old.tmp"  # how the name of a folder ends that is moved away for a moment


def file_in(folder: Path, name: str) -> Path:
    """The real path of a file of a folder.

    Links are followed inside the folder and, for a snapshot of the Hub's cache, into the cache's `blobs` beside it.

    Raises:
        ActValueError: if there is no such file, it is none (a folder, a pipe), or it lies outside.
    """
    root = folder.resolve()
    try:
        real = (folder / name).resolve(strict=True)
        is_file = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # nothing there, a loop of links, a zero byte in the name
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
    """Copy a file to one that does not exist yet, in the kernel and without new space where it can be shared."""
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


def check_output(output: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Check that a new folder may be written, before anything is.

    Raises:
        ActValueError: if the output exists (and is not to be overwritten, or does not look like a model), lies in an
            input or holds one, or its parent folder does not exist.
    """
    if not output.parent.is_dir():
        raise ActValueError(f"{output}: folder {output.parent} does not exist, expected an existing one (create it)")
    real = output.resolve()
    for folder in inputs:
        other = folder.resolve()
        if real.is_relative_to(other) or other.is_relative_to(real):
            raise ActValueError(
                f"{output}: is, lies in or holds the input {folder}, expected a folder beside it (name another one)"
            )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ActValueError(f"{output}: exists, expected a new folder (name another one, or pass overwrite=True)")
    names = os.listdir(output) if output.is_dir() and not output.is_symlink() else None
    if names is None or (names and not {"config.json", "adapter_config.json"} & set(names)):
        raise ActValueError(f"{output}: is no folder of a model, expected one to overwrite (remove it yourself)")


def check_room(output: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes.

    Raises:
        ActValueError: if it has not.
    """
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ActValueError(
            f"{output}: the disk has {free / 1e9:.2f} GB free, expected at least {needed / 1e9:.2f} GB (make room, or "
            "write to another disk)"
        )


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
