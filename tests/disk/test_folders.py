"""Folders: links, copies, checks of outputs, and new folders that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from act_peft import ActValueError
from act_peft.disk import atomic
from act_peft.disk.atomic import new_folder
from act_peft.disk.folders import check_output, check_room, copy_file, file_in


def test_files_inside_the_folder_are_found_also_through_links(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert file_in(tmp_path, "link") == (tmp_path / "real").resolve()
    (tmp_path / "other").symlink_to(tmp_path, target_is_directory=True)
    assert file_in(tmp_path / "other", "real").read_text() == "x"


def test_snapshots_of_the_hub_s_cache_may_lead_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert file_in(snapshot, "config.json") == blob.resolve()
    (tmp_path / "secret").write_text("x")
    (snapshot / "other").symlink_to(tmp_path / "secret")
    with pytest.raises(ActValueError, match=r"other: leads to .*secret, expected a file inside"):
        file_in(snapshot, "other")


def test_what_is_no_file_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    for name, match in {
        "link": "leads to .*outside, expected a file inside",
        "../outside": "leads to .*outside, expected a file inside",
        "/etc/passwd": "leads to /etc/passwd, expected a file inside",
        "loop": "no such file",
        "dangling": "no such file",
        "nothing": "no such file",
        "zero\0byte": "no such file",
        "sub": "is no regular file",
        "pipe": "is no regular file",
    }.items():
        with pytest.raises(ActValueError, match=match):
            file_in(folder, name)


@pytest.mark.parametrize("kernel", ["copies", "cannot", "stops"])
def test_copies_are_equal(tmp_path, monkeypatch, kernel):
    (tmp_path / "a").write_bytes(os.urandom(3_000_000))
    if kernel == "cannot":
        monkeypatch.delattr(os, "copy_file_range")
    elif kernel == "stops":
        real = os.copy_file_range
        calls = iter([1000, 0])
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, n: (n := next(calls)) and real(a, b, n))
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("error", [28, 18])
def test_a_full_disk_ends_a_copy_and_another_file_system_does_not(tmp_path, monkeypatch, error):
    (tmp_path / "a").write_bytes(b"content")

    def fail(*_):
        raise OSError(error, "refused")

    monkeypatch.setattr(os, "copy_file_range", fail)
    if error == 28:
        with pytest.raises(OSError, match="refused"):
            copy_file(tmp_path / "a", tmp_path / "b")
    else:
        copy_file(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"content"


def test_outputs_that_would_do_harm_are_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()

    def refused(output: Path, match: str, inputs: tuple[Path, ...] = (other,), overwrite: bool = True) -> None:
        with pytest.raises(ActValueError, match=match):
            check_output(output, inputs, overwrite=overwrite)

    refused(tmp_path / "a" / "b", "folder .*a does not exist, expected an existing one")
    refused(model, "is, lies in or holds the input", (model,))
    refused(model / "out", "is, lies in or holds the input", (model,))
    refused(tmp_path, "is, lies in or holds the input", (model,))
    refused(tmp_path / "link", "is, lies in or holds the input", (model,))
    refused(model, "exists, expected a new folder", overwrite=False)
    refused(tmp_path / "empty", "exists, expected a new folder", overwrite=False)
    refused(tmp_path / "precious", "is no folder of a model, expected one to overwrite")
    refused(tmp_path / "file", "is no folder of a model")
    refused(tmp_path / "link", "is no folder of a model")
    check_output(model, [other], overwrite=True)
    check_output(tmp_path / "empty", [other], overwrite=True)
    check_output(tmp_path / "new", [other], overwrite=False)


def test_room_is_checked(tmp_path):
    check_room(tmp_path / "x", 1)
    with pytest.raises(ActValueError, match=r"GB free, expected at least 1000000000\.00 GB"):
        check_room(tmp_path / "x", 10**18)


def test_a_new_folder_appears_at_the_end(tmp_path):
    output = tmp_path / "out [x]"
    with new_folder(output) as folder:
        (folder / "a").write_text("new")
        assert not output.exists()
    assert (output / "a").read_text() == "new"
    with new_folder(output) as folder:
        (folder / "b").write_text("newer")
        assert (output / "a").exists()
    assert os.listdir(tmp_path) == ["out [x]"]
    assert os.listdir(output) == ["b"]


# Only Linux exchanges names in one step.
WAYS = ["at once"] * sys.platform.startswith("linux") + ["one after the other"]


@pytest.fixture(params=WAYS)
def _exchange(request, monkeypatch):
    if request.param == "at once":
        monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("this was to happen in one step"))
    else:
        monkeypatch.setattr(atomic, "_exchange_at_once", lambda *_: False)


@pytest.mark.usefixtures("_exchange")
def test_an_older_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with new_folder(tmp_path / "out") as folder:
        (folder / "b").write_text("new")
        assert (tmp_path / "out" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["b"]


def test_an_older_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    rename, calls = os.rename, iter("ab")
    monkeypatch.setattr(atomic, "_exchange_at_once", lambda *_: False)

    def second_fails(a, b):
        if next(calls, None) == "b":
            raise OSError(5, "refused")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ActValueError, match=r"cannot be written .*refused"), new_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_between_two_renames_the_older_folder_is_not_lost(tmp_path, renames):
    output = tmp_path / "out"
    output.mkdir()
    (output / "a").write_text("old")
    code = """
import os, pathlib, signal, sys
from act_peft.disk import atomic

atomic._exchange_at_once = lambda *_: False
rename, calls = os.rename, []

def counted(a, b):
    rename(a, b)
    calls.append(a)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

os.rename = counted
with atomic.new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
"""
    child = subprocess.run([sys.executable, "-c", code, str(output), str(renames)], check=False, capture_output=True)
    assert child.returncode == -signal.SIGKILL
    before = "old" if renames == 1 else "new"
    assert output.exists() == (renames == 2)
    with pytest.raises(ValueError, match="stop"):
        fail_inside(output, ValueError("stop"))
    assert os.listdir(tmp_path) == ["out"]
    assert (output / "a").read_text() == before


def fail_inside(output: Path, error: BaseException) -> None:
    with new_folder(output) as folder:
        (folder / "a").write_text("x")
        raise error


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_inside(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(ActValueError, match=r"out: cannot be written .*refused.* nothing was left behind"):
        fail_inside(tmp_path / "out", OSError(28, "refused"))
    assert os.listdir(tmp_path) == []


def test_leftovers_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path / f".out.{'0' * 16}.tmp"
    dead.mkdir()
    (dead / "a").write_text("x")
    foreign = tmp_path / ".out.mine.tmp"
    foreign.mkdir()
    with new_folder(tmp_path / "out") as living:
        assert not dead.exists()
        with new_folder(tmp_path / "out"):
            assert living.exists()
        os.rmdir(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.mine.tmp", "out"]
