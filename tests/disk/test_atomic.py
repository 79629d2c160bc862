"""Files and folders appear whole or not at all, also after an error or a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from act_peft import ActValueError
from act_peft.adapter.card import write_model_card
from act_peft.disk import atomic
from act_peft.disk.atomic import new_folder, write_file


def test_a_file_is_written_and_replaced(tmp_path):
    write_file(tmp_path / "f", b"old")
    write_file(str(tmp_path / "f"), b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def flushed(file):
        fsync(file)
        seen.append((os.listdir(tmp_path), os.fstat(file).st_size))

    monkeypatch.setattr(os, "fsync", flushed)
    write_file(tmp_path / "f", b"12345")
    [([name], size)] = seen
    assert (name[:10], name[-4:], size) == (".act_peft.", ".tmp", 5)


@pytest.mark.parametrize("error", [OSError(28, "disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch, step, error):
    (tmp_path / "f").write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(atomic if step == "open" else os, step, fail, raising=step != "open")
    with pytest.raises(type(error)):
        write_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o277])
def test_permissions_follow_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_file(tmp_path / "f", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_card_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    names = ("base_model_name_or_path", "donor", "donor_revision", "adapted_modules", "density", "transfer_scale")
    with pytest.raises(OSError, match="disk full"):
        write_model_card(str(tmp_path), {**dict.fromkeys(names), "trainable": "deltas", "lora_twin": False})
    assert os.listdir(tmp_path) == []


def test_a_new_folder_appears_at_the_end(tmp_path):
    output = tmp_path / "out [x]"
    with new_folder(output, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert not output.exists()
    assert (output / "config.json").read_text() == "new"
    with new_folder(output, overwrite=True) as folder:
        (folder / "b").write_text("newer")
        assert (output / "config.json").exists()
    assert os.listdir(tmp_path) == ["out [x]"]
    assert os.listdir(output) == ["b"]


# Only Linux exchanges names in one step.
WAYS = ["at once"] * sys.platform.startswith("linux") + ["one after the other"]


@pytest.fixture(params=WAYS)
def _exchange(request, monkeypatch):
    if request.param == "at once":
        monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("this was to happen in one step"))
    else:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)


@pytest.mark.usefixtures("_exchange")
def test_an_older_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "b").write_text("new")
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["b"]


def test_an_older_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    rename, calls = os.rename, iter("ab")
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)

    def second_fails(a, b):
        if next(calls, None) == "b":
            raise OSError(5, "refused")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with (
        pytest.raises(ActValueError, match=r"cannot be written .*refused"),
        new_folder(tmp_path / "out", overwrite=True),
    ):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_between_two_renames_the_older_folder_is_not_lost(tmp_path, renames):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    code = """
import os, pathlib, signal, sys
from act_peft.disk import atomic

atomic.exchange = lambda *_: False
rename, calls = os.rename, []

def counted(a, b):
    rename(a, b)
    calls.append(a)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

os.rename = counted
with atomic.new_folder(pathlib.Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "config.json").write_text("new")
"""
    child = subprocess.run([sys.executable, "-c", code, str(output), str(renames)], check=False, capture_output=True)
    assert child.returncode == -signal.SIGKILL
    before = "old" if renames == 1 else "new"
    assert output.exists() == (renames == 2)
    with pytest.raises(ValueError, match="stop"):
        fail_inside(output, ValueError("stop"))
    assert os.listdir(tmp_path) == ["out"]
    assert (output / "config.json").read_text() == before


def fail_inside(output: Path, error: BaseException) -> None:
    with new_folder(output, overwrite=True) as folder:
        (folder / "a").write_text("x")
        raise error


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_inside(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(ActValueError, match=r"out: cannot be written .*refused.* nothing was left behind"):
        fail_inside(tmp_path / "out", OSError(28, "refused"))
    assert os.listdir(tmp_path) == []


def test_leftovers_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path / f".act_peft.{'0' * 16}.tmp"
    dead.mkdir()
    (dead / "a").write_text("x")
    foreign = tmp_path / ".act_peft.mine.tmp"
    foreign.mkdir()
    with new_folder(tmp_path / "out", overwrite=True) as living:
        assert not dead.exists()
        with new_folder(tmp_path / "out", overwrite=True):
            assert living.exists()
        os.rmdir(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".act_peft.mine.tmp", "out"]


def test_runs_that_write_into_one_folder_at_the_same_time_do_not_disturb_each_other(tmp_path):
    def write(number):
        for _ in range(100):
            write_file(tmp_path / str(number), b"x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
