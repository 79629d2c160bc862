"""Two forward passes that take turns, so that outputs of one need not wait in memory for the other to begin.

The base runs in a thread of its own, but never at the same time as the donor: it stops when what it has kept takes
enough memory, and goes on when the donor needs more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch


class Turns:
    """A first run in a thread and a second one in the caller's thread, one at a time.

    Args:
        first: the first run. It may call `pause`.
    """

    def __init__(self, first: Callable[[], None]) -> None:
        self._first = first
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = self._given_up = False
        self._enter = _thread_state()

    def pause(self) -> None:
        """Called by the first run: let the second one go on until it calls `more`."""
        self._back.release()
        self._go.acquire()
        if self._given_up:
            raise _GivenUpError

    def more(self) -> bool:
        """Called by the second run: let the first one go on until it pauses or ends.

        Returns:
            False if the first run had ended before.
        """
        if self._ended:
            return False
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the context the first run goes on whenever `more` is called; it has ended afterwards."""
        thread = threading.Thread(target=self._run, name="localize base", daemon=True)
        thread.start()
        try:
            yield
            while self.more():
                pass
        finally:
            self._given_up = True
            self._go.release()
            thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._given_up:
                with self._enter():
                    self._first()
        except _GivenUpError:
            pass
        except BaseException as error:  # raised in the caller's thread
            self._error = error
        finally:
            self._ended = True
            self._back.release()


class _GivenUpError(Exception):
    """Ends the first run because the second one has failed."""


def _thread_state() -> Callable[[], ExitStack]:
    """What a new thread does not take over from this one: gradients, autocast, device and stream."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    types = {"cpu"} | ({accelerator.type} if accelerator is not None else set())
    casts = {kind: torch.get_autocast_dtype(kind) for kind in types if torch.is_autocast_enabled(kind)}
    stream = torch.accelerator.current_stream() if accelerator is not None else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        for kind, dtype in casts.items():
            stack.enter_context(torch.autocast(kind, dtype))
        if stream is not None:
            torch.accelerator.set_stream(stream)
        return stack

    return enter
