"""Renames that never replace anything, and those that exchange two names: in one step where the system can."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD in linux/fcntl.h
_NO_REPLACE, _EXCHANGE = 1, 2  # RENAME_NOREPLACE and RENAME_EXCHANGE in linux/fs.h
_LACKING = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # a kernel or a file system that does not know the flag


def rename_new(source: Path, target: Path) -> None:
    """Give a file or folder a name that nothing has.

    Raises:
        FileExistsError: if something has the name, at whatever moment it appeared. `source` stays.
        OSError: if the system refuses.
    """
    if _renamed(source, target, _NO_REPLACE):
        return
    if os.name == "nt":  # there this is what a plain rename does
        os.rename(source, target)
    elif source.is_dir():
        _take_name_of_folder(source, target)
    else:
        _take_name_of_file(source, target)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system has no such step.

    Raises:
        OSError: if the system refuses.
    """
    return _renamed(a, b, _EXCHANGE)


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Call Linux' `renameat2`, for which Python has no name; False where it, or the flag, is missing."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), os.fspath(source), None, os.fspath(target))


def _take_name_of_folder(source: Path, target: Path) -> None:
    """Take the name with an empty folder, which a rename replaces as long as it is empty."""
    os.mkdir(target)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from error
        with contextlib.suppress(OSError):
            os.rmdir(target)
        raise


def _take_name_of_file(source: Path, target: Path) -> None:
    """A link is a second name and never replaces; without links an empty file takes the name first."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(source, target)
    else:
        os.unlink(source)
