"""Ctrl-C: a command ends with one line at any moment, and steps that belong together are not cut in two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import act_peft
from act_peft.disk.atomic import new_folder
from act_peft.interrupts import scratch_folder, temporary, uninterrupted

ROOT = Path(act_peft.__file__).parent.parent
CHECKPOINTS = ROOT / "act_peft" / "demo" / "checkpoints"
LINE = "act-peft: interrupted"

# The package believes to be the command, and the library is not imported.
AS_COMMAND = "import sys; sys.orig_argv = [sys.executable, '-m', 'act_peft']; sys.argv = ['-m']; import act_peft\n"
# Work that catches everything that is raised in it, with a thread that writes and a forked process.
WORKING = """
import os, pathlib, threading, time
from act_peft.disk.atomic import new_folder
from act_peft.interrupts import scratch_folder

def write(folder):
    for number in range(10**6):
        try:
            (folder / str(number)).write_text("half")
        except OSError:
            pass

with scratch_folder() as scratch, new_folder(pathlib.Path(OUTPUT), overwrite=False) as folder:
    threading.Thread(target=write, args=(folder,), daemon=True).start()
    if os.fork():
        print(scratch, flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:
            pass
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_command_at_work_ends_with_one_line_and_leaves_nothing(tmp_path):
    code = AS_COMMAND + WORKING.replace("OUTPUT", repr(str(tmp_path / "out")))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    with process:
        scratch = Path(process.stdout.readline().strip())
        assert scratch.is_dir()
        time.sleep(0.05)
        sent = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: a forked process gets it too
        try:
            _, error = process.communicate(timeout=20)
        finally:
            process.kill()
        assert time.monotonic() - sent < 2
    assert (process.returncode, error) == (130, f"{LINE}\n")
    assert os.listdir(tmp_path) == []


def test_an_ignored_signal_stays_ignored():
    code = (
        f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{AS_COMMAND}"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_quick_steps_are_not_cut_in_two():
    before, done = signal.getsignal(signal.SIGINT), []

    def steps():
        with uninterrupted():
            done.append(1)
            signal.raise_signal(signal.SIGINT)
            done.append(2)
        done.append(3)

    with pytest.raises(KeyboardInterrupt):
        steps()
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_may_take_the_steps():
    seen = []

    def steps():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_ctrl_c_while_a_folder_is_removed(tmp_path, monkeypatch):
    import shutil

    rmtree, calls = shutil.rmtree, []

    def interrupted(folder, **settings):
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(folder, **settings)

    (tmp_path / "a").mkdir()
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_scratch_folders_are_removed():
    with scratch_folder() as folder:
        (folder / "a").write_text("x")
    assert not folder.exists()


def test_ctrl_c_in_a_script_removes_what_was_not_whole(tmp_path):
    def work():
        with new_folder(tmp_path / "out", overwrite=False) as folder:
            (folder / "a").write_text("half")
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("command", ["localize", "fit"])
def test_at_any_moment(tmp_path, command):
    rows = [json.dumps({"prompt": "3 plus 4 ", "completion": "is 7"})] * 100
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    output, data = tmp_path / "out", str(tmp_path / "data.jsonl")
    arguments = ["--base", str(CHECKPOINTS / "base"), "--donor", str(CHECKPOINTS / "donor"), "--dataset", data]
    line = [sys.executable, "-m", "act_peft", command, *arguments, "--device", "cpu", "--output", str(output)]
    if command == "fit":
        line += ["--keep-dataset", data]
    settings = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = time.monotonic()
    subprocess.run(line, check=True, **settings)
    whole, expected = time.monotonic() - started, output.read_bytes()
    outcomes = set()
    for n in range(1, 31):
        output.unlink(missing_ok=True)
        with subprocess.Popen(line, text=True, **settings) as process:
            time.sleep(0.2 + n / 28 * whole)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            try:
                _, error = process.communicate(timeout=30)
            finally:
                process.kill()
        if process.returncode:
            assert time.monotonic() - sent < 2
            assert process.returncode == 130
            assert error.splitlines()[-1] == LINE
            assert "Traceback" not in error
        assert not output.exists() or output.read_bytes() == expected
        assert {path.name for path in tmp_path.iterdir()} <= {"data.jsonl", "out"}
        outcomes.add(process.returncode)
    assert 130 in outcomes
