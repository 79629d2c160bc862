"""Imports of the library and of what it builds on: they take seconds, in which a user may press Ctrl-C."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit status, as of a process that SIGINT ends
INTERRUPTED_LINE = "act-peft: interrupted"


@contextmanager
def importing(*, library: bool = True) -> Iterator[None]:
    """Around slow imports: they begin with the library itself, and Ctrl-C ends the process at once.

    Without `library` they do not: what needs neither models nor PEFT starts sooner and takes less memory.

    A KeyboardInterrupt in the middle of an import can be caught by the modules that are being imported, transformers'
    for example, and then the work would go on. Nothing has been written at this point, so nothing is left to clean up.
    """
    replace = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not if the signal is ignored, as by nohup
    )
    if replace:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        if library:
            importlib.import_module("act_peft.library")
        yield
    finally:
        if replace:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)
