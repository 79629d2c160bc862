"""Hidden folders, in which everything is written before it gets its name, and what killed runs left of them.

They are called `.act_peft.HEX.tmp` and lie in the folder of the output. A run holds a lock on its own ones. The lock
ends with the process, so a folder without one is a leftover, whatever process has the number of the old one today. The
next run that writes into the same place removes it. Where there are no locks (Windows, some network file systems)
leftovers stay.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from act_peft.interrupts import temporary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_START, _END = ".act_peft.", ".tmp"
_HIDDEN = re.compile(r"\.act_peft\.[0-9a-f]{16}(?:\.old\.(.+))?\.tmp", re.DOTALL)


@dataclass(frozen=True)
class HiddenFolder:
    """A hidden folder of this process.

    Attributes:
        path: where it is.
        mode: permissions of a new folder here, as the umask has them.
    """

    path: Path
    mode: int

    def honour_umask(self) -> None:
        """Give everything inside the permissions of new files and folders; some writers have rules of their own."""
        for folder, _, files in os.walk(self.path, topdown=False):
            for name in files:
                if not os.path.islink(os.path.join(folder, name)):
                    os.chmod(os.path.join(folder, name), self.mode & 0o666)
            os.chmod(folder, self.mode)


@contextmanager
def hidden_folder(parent: Path) -> Iterator[HiddenFolder]:
    """A new hidden folder in `parent`. What has its name at the end of the block is removed.

    Raises:
        OSError: if the system refuses.
    """
    clear_leftovers(parent)
    while True:
        path = parent / f"{_START}{secrets.token_hex(8)}{_END}"
        with temporary(path):
            path.mkdir()
            try:
                mode = path.stat().st_mode & 0o777
                os.chmod(path, mode | 0o700)
                lock = lock_of(path)
            except (
                FileNotFoundError,
                BlockingIOError,
            ):  # a different run took it for a leftover
                continue
            try:
                yield HiddenFolder(path, mode)
            finally:
                unlock(lock)
            return


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden folder."""
    return _HIDDEN.fullmatch(name) is not None


def name_of_older(hidden: Path, output: Path) -> Path:
    """The hidden name under which an older `output` waits; it says what to put back if the run is killed."""
    return hidden.with_name(f"{hidden.name.removesuffix(_END)}.old.{output.name}{_END}")


def lock_of(folder: Path) -> int | None:
    """Lock a folder, which shows other runs that it is in use.

    Returns:
        The file descriptor that holds the lock; None where there are no locks.

    Raises:
        OSError: if the folder is gone, or a different run holds its lock.
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder)):
            raise FileNotFoundError(f"{folder}: is a different folder now")
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return lock


def unlock(lock: int | None) -> None:
    """Give a lock back."""
    if lock is not None:
        os.close(lock)


def clear_leftovers(parent: Path) -> None:
    """Remove the hidden folders that nobody holds a lock on, or put back the older output that waits in one."""
    with suppress(OSError):  # no such folder, or it may not be read
        for name in [name for name in os.listdir(parent) if name.startswith(_START)]:
            found = _HIDDEN.fullmatch(name)
            if found is not None:
                with suppress(OSError):
                    _clear(parent / name, older=None if found[1] is None else parent / found[1])


def _clear(hidden: Path, *, older: Path | None) -> None:
    lock = lock_of(hidden)
    if lock is None:
        return
    try:
        if older is not None and not os.path.lexists(older):
            os.rename(hidden, older)
        else:
            shutil.rmtree(hidden, ignore_errors=True)
    finally:
        unlock(lock)
