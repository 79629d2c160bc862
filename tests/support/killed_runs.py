"""Real processes that are killed: a parent imports the library once and forks a run for every line that it reads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PARENT = """
import os, shutil, sys, time
import act_peft
from act_peft.merging import writing
from act_peft.disk import atomic

def slow(function):
    def slowed(*arguments, **settings):
        time.sleep(0.005)
        result = function(*arguments, **settings)
        time.sleep(0.005)
        return result
    return slowed

parts = writing._Writing
parts._write_tensor, writing.copy_file = slow(parts._write_tensor), slow(writing.copy_file)
atomic._exchange, shutil.rmtree = slow(atomic._exchange), slow(shutil.rmtree)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        exec(line)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@contextlib.contextmanager
def slow_runs() -> Iterator[Callable[[str, Callable[[], object]], float]]:
    """Gives a function that runs a statement in a slowed process, kills it when its second argument returns, and says
    how many seconds it lived."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout.readline() == "ready\n"

        def run(statement: str, wait: Callable[[], object]) -> float:
            start = time.perf_counter()
            print(statement, file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            wait()
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "ended\n"
            return time.perf_counter() - start

        yield run
        parent.stdin.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
