"""Ctrl-C: steps that it does not cut in two, and a command that it ends at once.

A KeyboardInterrupt is raised in the middle of whatever runs. Modules that are being imported, transformers' for
example, can catch it and go on, and a destructor prints it and goes on. A command therefore ends inside the signal's
handler. It has nothing to clean up but what it named here with `temporary`: its results are in hidden folders until
they are whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

INTERRUPTED = 130  # exit status, as of a process that SIGINT ends
INTERRUPTED_LINE = "act-peft: interrupted"

_temporary: set[tuple[int, Path]] = set()  # process and folder; a forked process does not own its parent's


@contextmanager
def temporary(folder: Path) -> Iterator[None]:
    """Remove a folder when the block ends, or when Ctrl-C ends a command."""
    entry = (os.getpid(), folder)
    _temporary.add(entry)
    try:
        yield
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:  # Ctrl-C while it is removed
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            _temporary.discard(entry)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder among the system's temporary files, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="act_peft."))
    with temporary(folder):
        yield folder


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Around a few quick steps that belong together: Ctrl-C waits until they are done."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield  # a handler that is not Python's cannot be put back
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def end_at_once_() -> None:
    """From now on Ctrl-C ends this process with one line and status 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as by nohup
        signal.signal(signal.SIGINT, _Ending(os.getpid()))


def is_done_() -> None:
    """From now on Ctrl-C does nothing: the work is done, and Python only takes itself down."""
    if isinstance(signal.getsignal(signal.SIGINT), _Ending):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Ending:
    """The handler of a process. Its forked children (of a DataLoader) end without a word."""

    def __init__(self, process: int) -> None:
        self._process = process

    def __call__(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.getpid() == self._process:
            for process, folder in list(_temporary):
                if process == self._process:
                    _remove(folder)
            with contextlib.suppress(Exception):  # the output may be what was interrupted
                sys.stdout.flush()
            os.write(2, f"{INTERRUPTED_LINE}\n".encode())
        os._exit(INTERRUPTED)


def _remove(folder: Path) -> None:
    """Remove a folder in which other threads may still write: under its new name they do not find it."""
    gone = folder.with_name(f"{folder.name}.gone.tmp")
    try:
        os.rename(folder, gone)
    except OSError:
        gone = folder
    shutil.rmtree(gone, ignore_errors=True)
