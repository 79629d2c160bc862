import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from act_peft.disk import tensorfile
from act_peft.errors import ActValueError

# Wherever it is cut or changed, the message says what a safetensors file must be.
NOT_WHOLE = r"f: .*(expected a(n| whole)? ?(safetensors file|object)|header (is damaged|says)|by its header|got dtype)"

TENSORS = {"b": torch.tensor([1, 2, 3]), "a": torch.tensor([0.5, -1.0], dtype=torch.float64)}
METADATA = {"z": 1, "names": ["b", "a"]}


def write(path, **changes):
    arguments = {"kind": "thing", "version": 2, "tensors": TENSORS, "metadata": METADATA, **changes}
    tensorfile.write(path, **arguments)
    return path


def with_header(path, header):
    """A file whose act_peft metadata is the given text."""
    save_file({"a": torch.zeros(1)}, path, metadata={"act_peft": header})
    return path


def test_reads_what_was_written(tmp_path):
    tensors, metadata = tensorfile.read(write(tmp_path / "f"), "thing", 2)
    assert list(tensors) == ["a", "b"]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert {name: t.dtype for name, t in tensors.items()} == {"a": torch.float64, "b": torch.int64}
    assert metadata == METADATA


def test_bytes_are_pinned(tmp_path):
    data = write(tmp_path / "f").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + size])["__metadata__"] == {
        "act_peft": '{"kind":"thing","metadata":{"names":["b","a"],"z":1},"version":2}'
    }
    assert hashlib.sha256(data).hexdigest() == "bc7bf71b08714ab7451220fdbe07a8bbf89b857e7ad977d2dc83996d7c8b045b"


def test_large_files_are_written_tensor_by_tensor(tmp_path):
    tensors = {"b": torch.arange(3, dtype=torch.bfloat16), "a": torch.ones(2, 3).T, "c": torch.tensor(2.0).double()}
    tensorfile.write_large(tmp_path / "f", "thing", 2, tensors, METADATA)
    found, metadata = tensorfile.read(tmp_path / "f", "thing", 2)
    assert metadata == METADATA
    assert sorted(found) == sorted(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    again = tmp_path / "again"
    tensorfile.write_large(again, "thing", 2, dict(sorted(tensors.items())), METADATA)
    assert again.read_bytes() == (tmp_path / "f").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "f"]
    with pytest.raises(ActValueError, match="got a folder"):
        tensorfile.write_large(tmp_path, "thing", 2, tensors, METADATA)


def test_bytes_do_not_depend_on_order(tmp_path):
    one = write(tmp_path / "one")
    other = write(
        tmp_path / "other",
        tensors=dict(reversed(TENSORS.items())),
        metadata=dict(reversed(METADATA.items())),
    )
    assert one.read_bytes() == other.read_bytes()


def test_tensors_are_copies(tmp_path):
    path = write(tmp_path / "f")
    before = path.read_bytes()
    tensors, _ = tensorfile.read(path, "thing", 2)
    tensors["b"].zero_()
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(tensors["a"], TENSORS["a"])


def test_shared_empty_and_transposed_tensors(tmp_path):
    shared = torch.arange(6).view(2, 3)
    given = {"one": shared, "two": shared, "view": shared.t(), "empty": torch.empty(0), "empty2": torch.empty(0)}
    tensors, _ = tensorfile.read(write(tmp_path / "f", tensors=given), "thing", 2)
    assert tensors.keys() == given.keys()
    assert all(torch.equal(tensors[name], given[name]) for name in given)


def test_an_older_file_is_replaced(tmp_path):
    path = write(tmp_path / "f")
    write(path, tensors={})
    assert tensorfile.read(path, "thing", 2)[0] == {}
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, step, error):
    path = write(tmp_path / "f")
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write(path, tensors={})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f"]


def test_metadata_that_is_not_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        write(tmp_path / "f", metadata={"x": object()})
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path / "f", metadata={"x": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        assert write(tmp_path / "f").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)


def test_refuses_to_write_over_a_folder(tmp_path):
    with pytest.raises(ActValueError, match=r"got a folder, expected the name of a file to write"):
        write(tmp_path)


def test_refuses_to_write_into_a_missing_folder(tmp_path):
    with pytest.raises(ActValueError, match=r"missing does not exist, expected an existing one"):
        write(tmp_path / "missing" / "f")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ActValueError, match=r"got a folder, expected a file"):
        tensorfile.read(tmp_path, "thing", 2)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ActValueError, match=r"f: no such file, expected a file of kind 'thing'"):
        tensorfile.read(tmp_path / "f", "thing", 2)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ActValueError, match=r"f: got an empty file"):
        tensorfile.read(tmp_path / "f", "thing", 2)


def test_every_cut_is_noticed(tmp_path):
    path = write(tmp_path / "f")
    data = path.read_bytes()
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ActValueError, match=NOT_WHOLE):
            tensorfile.read(path, "thing", 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[2]", b"[3]"),  # a shape that does not fit the bytes
        (b'"I64"', b'"I32"'),
        (b'"dtype"', b'"dtxpe"'),
        (b"[24,40]", b"[24,99]"),
        (b"[24,40]", b"[20,40]"),
    ],
)
def test_a_header_that_lies_is_noticed(tmp_path, old, new):
    path = write(tmp_path / "f")
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ActValueError, match=NOT_WHOLE):
        tensorfile.read(path, "thing", 2)


@pytest.mark.parametrize("data", [b"x", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02}q\0.", b"\xff" * 64, b"{}" * 50])
def test_other_formats_are_refused(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ActValueError, match=NOT_WHOLE):
        tensorfile.read(tmp_path / "f", "thing", 2)


def test_a_checkpoint_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "f", metadata={"format": "pt"})
    with pytest.raises(ActValueError, match=r"f: got a safetensors file without 'act_peft' metadata"):
        tensorfile.read(tmp_path / "f", "thing", 2)
    save_file({"a": torch.zeros(1)}, tmp_path / "f")
    with pytest.raises(ActValueError, match=r"f: got a safetensors file without 'act_peft' metadata"):
        tensorfile.read(tmp_path / "f", "thing", 2)


def test_another_kind_is_refused(tmp_path):
    with pytest.raises(ActValueError, match=r"f: got a file of kind 'thing', expected 'other'"):
        tensorfile.read(write(tmp_path / "f"), "other", 2)


def test_a_newer_version_is_refused(tmp_path):
    with pytest.raises(
        ActValueError, match=r"f: got version 3 of kind 'thing', expected at most 2 \(upgrade act_peft"
    ):
        tensorfile.read(write(tmp_path / "f", version=3), "thing", 2)


def test_an_older_version_is_read(tmp_path):
    assert tensorfile.read(write(tmp_path / "f", version=1), "thing", 2)[1] == METADATA


def test_version_zero_is_refused(tmp_path):
    with pytest.raises(ActValueError, match=r"f: got version 0 of kind 'thing', expected 1 to 2"):
        tensorfile.read(write(tmp_path / "f", version=0), "thing", 2)


def test_metadata_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(ActValueError, match=r"f: 'act_peft' metadata: is not JSON"):
        tensorfile.read(with_header(tmp_path / "f", "{"), "thing", 2)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"kind": 1, "version": 1, "metadata": {}}',
        '{"kind": "thing", "version": "1", "metadata": {}}',
        '{"kind": "thing", "version": true, "metadata": {}}',
        '{"kind": "thing", "version": 1}',
    ],
)
def test_metadata_of_another_form_is_refused(tmp_path, header):
    with pytest.raises(ActValueError, match=r"expected an object"):
        tensorfile.read(with_header(tmp_path / "f", header), "thing", 2)
