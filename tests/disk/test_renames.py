"""Renames that replace nothing, whatever the system offers."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from types import SimpleNamespace

import pytest

from act_peft import ActValueError
from act_peft.disk import renames
from act_peft.disk.atomic import new_file, new_folder
from act_peft.disk.renames import exchange, rename_new

WAYS = ["in one step"] * sys.platform.startswith("linux") + ["elsewhere", "without links"]


@pytest.fixture(params=WAYS)
def _way(request, monkeypatch):
    if request.param != "in one step":
        monkeypatch.setattr(renames, "_renamed", lambda *_: False)
    if request.param == "without links":

        def refuse(*_, **__):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("_way")
def test_a_free_name_is_taken(tmp_path):
    (tmp_path / "a").write_text("file")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inside").write_text("folder")
    rename_new(tmp_path / "a", tmp_path / "file")
    rename_new(tmp_path / "b", tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "file"
    assert (tmp_path / "folder" / "inside").read_text() == "folder"


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("there", ["file", "folder", "empty folder", "broken link"])
@pytest.mark.parametrize("ours", ["file", "folder"])
def test_nothing_is_replaced(tmp_path, there, ours):
    source, target = tmp_path / "new", tmp_path / "out"
    source.write_text("new") if ours == "file" else source.mkdir()
    if there == "file":
        target.write_text("mine")
    elif there == "broken link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if there == "folder":
            (target / "precious").write_text("mine")
    with pytest.raises(FileExistsError):
        rename_new(source, target)
    assert source.exists()
    assert target.is_symlink() == (there == "broken link")
    assert there != "file" or target.read_text() == "mine"
    assert there != "folder" or (target / "precious").read_text() == "mine"


def test_what_is_put_into_the_folder_that_holds_the_name_stays(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    monkeypatch.setattr(renames, "_renamed", lambda *_: False)
    mkdir = os.mkdir

    def with_a_file(path):
        mkdir(path)
        (tmp_path / "out" / "precious").write_text("mine")

    monkeypatch.setattr(os, "mkdir", with_a_file)
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "new", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_a_folder_that_cannot_be_renamed_leaves_the_name_free(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    monkeypatch.setattr(renames, "_renamed", lambda *_: False)

    def refuse(*_):
        raise OSError(errno.EIO, "refused")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        rename_new(tmp_path / "new", tmp_path / "out")
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2")
def test_a_file_system_without_the_flag_is_no_error(tmp_path, monkeypatch):
    def lacks(*_):
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lacks))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert not exchange(tmp_path / "a", tmp_path / "b")
    rename_new(tmp_path / "a", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2")
def test_another_refusal_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "b")


@pytest.mark.usefixtures("_way")
def test_overwrite_false_holds_until_the_end(tmp_path):
    with pytest.raises(ActValueError, match=r"out: exists, and did not when this run began, expected a new folder"):
        _folder_with(tmp_path / "out", lambda: (tmp_path / "out").mkdir())
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(ActValueError, match=r"f: exists, and did not when this run began, expected a new file"):
        _file_with(tmp_path / "f", lambda: (tmp_path / "f").write_text("mine"))
    assert (tmp_path / "f").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["f", "out"]


def test_what_appears_and_is_no_model_is_not_overwritten_either(tmp_path):
    def appear():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")

    with pytest.raises(ActValueError, match=r"out: is no folder of a model"):
        _folder_with(tmp_path / "out", appear, overwrite=True)
    assert os.listdir(tmp_path / "out") == ["precious"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("_way")
def test_of_two_runs_to_one_output_one_succeeds(tmp_path):
    with pytest.raises(ActValueError, match="exists, and did not when this run began"):
        _folder_with(tmp_path / "out", lambda: _folder_with(tmp_path / "out", lambda: None))
    assert os.listdir(tmp_path) == ["out"]


def _folder_with(output, happens, *, overwrite=False):
    with new_folder(output, overwrite=overwrite) as folder:
        (folder / "a").write_text("new")
        happens()


def _file_with(output, happens):
    with new_file(output, overwrite=False) as path:
        path.write_text("new")
        happens()
