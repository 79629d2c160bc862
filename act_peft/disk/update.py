"""Files that become a part of a folder, all at the same moment.

The folder may hold more than what is written: a Trainer's state, the user's notes, other adapters. The new files are
written in a hidden folder. At the end it gets links to all other files of the folder, and the two folders exchange
their names in one step. Nobody ever sees one new file beside an old one, or one file of the rest missing.

That step is not possible everywhere: not without Linux' `renameat2`, not where files cannot be linked, and not for a
folder in which a process works, which is a mount point, or which has very many files. There the new files are renamed
one after the other. The file that makes the others readable goes first and comes last, so a run that is killed in
between leaves a folder that cannot be read, never a mixed one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from act_peft.disk.hidden import HiddenFolder, clear_leftovers, hidden_folder, is_hidden, lock_of, unlock
from act_peft.disk.renames import exchange, rename_new
from act_peft.errors import ActValueError
from act_peft.interrupts import uninterrupted

_MOST = 1000  # files and folders that are linked
_PATIENCE = 2.0  # seconds for a different run that adds files to the same folder


@contextmanager
def updated_folder(folder: str | os.PathLike[str], *, read: Collection[str], last: str) -> Iterator[Path]:
    """A hidden folder whose files become files of `folder` when the block ends. After an error `folder` is as it was.

    Args:
        folder: the folder; it is created if there is none.
        read: files of the folder that the block reads or changes; the hidden folder begins with copies of them.
        last: name of the file without which the others are not read.

    Raises:
        ActValueError: if the disk refuses a write.
    """
    real = Path(os.path.realpath(folder))
    try:
        os.makedirs(real.parent, exist_ok=True)
        clear_leftovers(real)
        with hidden_folder(real.parent if _is_exchangeable(real) else real) as hidden:
            for name in read:
                if (real / name).is_file():
                    (hidden.path / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(real / name, hidden.path / name)
            yield hidden.path
            with uninterrupted():
                _join(hidden, real, last)
    except (OSError, SafetensorError) as error:
        raise ActValueError(
            f"{folder}: cannot be written ({error}), the folder is as it was (is there room, may you write here?)"
        ) from error


def _is_exchangeable(folder: Path) -> bool:
    """Whether a different folder may take the name of this one."""
    if not folder.exists():
        return True
    with suppress(FileNotFoundError):  # the folder in which this process works is gone
        if Path(os.getcwd()).is_relative_to(folder):
            return False
    return not os.path.ismount(folder) and os.access(folder.parent, os.W_OK) and _is_linkable(folder)


def _is_linkable(folder: Path) -> bool:
    """Whether a folder holds few things, and only files, links and folders."""
    count = 0
    for parent, folders, files in os.walk(folder):
        if any(is_hidden(name) for name in folders):  # a different run writes there
            return False
        count += len(folders) + len(files)
        paths = [os.path.join(parent, name) for name in files]
        if count > _MOST or any(os.path.ismount(os.path.join(parent, name)) for name in folders):
            return False
        if not all(os.path.isfile(path) or os.path.islink(path) for path in paths):
            return False
    return True


def _join(hidden: HiddenFolder, folder: Path, last: str) -> None:
    hidden.honour_umask()
    names = _files_in(hidden.path)
    if hidden.path.parent == folder.parent:
        with suppress(FileExistsError):
            rename_new(hidden.path, folder)
            return
        os.chmod(hidden.path, 0o700)
        if _exchanged(hidden.path, folder, set(names)):
            return
    os.chmod(hidden.path, 0o700)
    _move(hidden.path, folder, names, last)


def _files_in(folder: Path) -> list[Path]:
    """The files, and links to folders, of a folder and its folders, relative to it."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name).relative_to(folder) for name in (*files, *links)]
    return sorted(found)


def _exchanged(new: Path, folder: Path, written: set[Path]) -> bool:
    """Link the other files of `folder` into `new` and exchange both; False where that is not possible."""
    lock = None
    try:
        lock = _patient_lock(folder)
        for path in _files_in(folder):
            if path not in written:
                _make_folders(folder, new, path.parent)
                os.link(folder / path, new / path, follow_symlinks=False)
        for path in _folders_in(folder):
            _make_folders(folder, new, path)
        _copy_facts(folder, new)
        done = exchange(new, folder)
    except OSError:
        done = False
    try:
        if done:  # now `new` is the older folder
            _move_late(new, folder, written)
    finally:
        unlock(lock)
    return done


def _patient_lock(folder: Path) -> int | None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return lock_of(folder)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _folders_in(folder: Path) -> list[Path]:
    return [Path(parent).relative_to(folder) for parent, _, _ in os.walk(folder)]


def _make_folders(old: Path, new: Path, path: Path) -> None:
    """Make a folder in `new` as it is in `old`, with those around it."""
    for part in [*reversed(path.parents), path]:
        if not (new / part).is_dir():
            (new / part).mkdir()
            _copy_facts(old / part, new / part)


def _copy_facts(old: Path, new: Path) -> None:
    """Permissions and owner of a folder."""
    shutil.copystat(old, new)
    a, b = old.stat(), new.stat()
    if (a.st_uid, a.st_gid) != (b.st_uid, b.st_gid):
        os.chown(new, a.st_uid, a.st_gid)


def _move_late(old: Path, folder: Path, written: set[Path]) -> None:
    """Move what others have put into the older folder since its files were linked."""
    for path in _files_in(old):
        if path not in written and not _is_same(old / path, folder / path):
            (folder / path.parent).mkdir(parents=True, exist_ok=True)
            os.replace(old / path, folder / path)


def _is_same(a: Path, b: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(a), os.lstat(b))
    return False


def _move(new: Path, folder: Path, names: list[Path], last: str) -> None:
    """Rename files one after the other."""
    for path in names:
        if path.name == last:
            (folder / path).unlink(missing_ok=True)
    for path in sorted(names, key=lambda path: (path.name == last, path)):
        (folder / path.parent).mkdir(parents=True, exist_ok=True)
        os.replace(new / path, folder / path)
