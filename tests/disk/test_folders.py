"""Folders: links, copies, and checks of outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from act_peft import ActValueError
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
