"""The reader of checkpoints: one file or several, a folder or the Hub, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from act_peft import ActValueError
from act_peft.disk import locations
from act_peft.disk.checkpoint import INDEX, SINGLE, Checkpoint
from tests.support.tiny_checkpoints import save_relatives, write_shard
from tests.support.tiny_models import build


@pytest.mark.parametrize("shards", [False, True])
def test_it_reads_what_transformers_wrote(family, dtype, shards, tmp_path):
    save_relatives(tmp_path, family, dtype=dtype, shards=shards)
    model = build(family, dtype=dtype)
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    with Checkpoint.open(tmp_path / "base") as base:
        assert set(base.names) == set(expected)
        assert (len(base.files) > 1) == shards
        assert base.config["model_type"] == model.config.model_type
        for name, tensor in expected.items():
            assert name in base
            assert base.shape(name) == tuple(tensor.shape)
            assert base.dtype(name) == dtype
            assert base.file_of(name) in base.files
            assert torch.equal(base.tensor(name), tensor)
            index = torch.arange(0, tensor.shape[0], 3)
            assert torch.equal(base.rows(name, index), tensor[index])
            if tensor.dim() == 2:
                index = torch.arange(0, tensor.shape[1], 2)
                assert torch.equal(base.rows(name, index, 1), tensor[:, index])


def test_nothing_is_opened_before_it_is_needed(tmp_path):
    save_relatives(tmp_path, "llama")
    with Checkpoint.open(tmp_path / "base") as base:
        assert base._shards == {}
        base.rows("lm_head.weight", torch.tensor([1]))
        assert list(base._shards) == [base.file_of("lm_head.weight")]
    with pytest.raises(ValueError, match="closed file"):
        base.tensor("lm_head.weight")


def refused(folder, match, read=lambda c: [c.tensor(name) for name in c.names]):
    with pytest.raises(ActValueError, match=match), Checkpoint.open(folder) as opened:
        read(opened)


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: cannot be opened, expected a folder with a checkpoint, .*no such folder")
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "got a file, expected a folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickled_checkpoints_are_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"x": 1}))
    refused(tmp_path, f"got pickled weights .{name}.*, expected safetensors .*save_pretrained")


def test_an_incomplete_sharded_checkpoint_is_refused(tmp_path):
    save_relatives(tmp_path, "llama")
    folder = tmp_path / "base"
    first = sorted(file for file in os.listdir(folder) if file.endswith(".safetensors"))[0]
    tensors = load_file(folder / first)
    lost = sorted(tensors)[0]
    tensors.pop(lost)
    save_file(tensors, folder / first)
    refused(folder, f"has no tensor '{lost}', expected one")
    (folder / first).unlink()
    refused(folder, f"index.json: names {first}, which is missing in the folder")


INDICES = {
    "not JSON": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "got .., expected an object"),
    "no table": ("{}", "weight_map is None, expected names of tensors"),
    "numbers": ('{"weight_map": {"a": 3}}', "weight_map is .*, expected names of tensors"),
    "another folder": ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map is .*, expected names of tensors"),
    "a pickle": ('{"weight_map": {"a": "x.bin"}}', "weight_map is .*, expected names of tensors"),
}


@pytest.mark.parametrize("what", INDICES)
def test_damaged_indices_are_refused(tmp_path, what):
    text, match = INDICES[what]
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, match)


def test_links_out_of_the_folder_are_refused(tmp_path):
    save_relatives(tmp_path, "llama", shards=False)
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / SINGLE).symlink_to(tmp_path / "base" / SINGLE)
    refused(folder, "leads to .*, expected a file inside")


def test_missing_tensors_and_configurations_are_named(tmp_path):
    save_relatives(tmp_path, "llama")
    refused(
        tmp_path / "base",
        "other.weight is missing in the checkpoint",
        lambda c: c.rows("other.weight", torch.tensor([0])),
    )
    (tmp_path / "base" / "config.json").unlink()
    refused(tmp_path / "base", "config.json: no such file", lambda c: c.config)
    (tmp_path / "base" / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "base", "config.json: is not JSON", lambda c: c.config)


class Hub:
    """A Hub with one model, and the cache's layout of links."""

    def __init__(self, tmp_path, source):
        self.source, self.asked = source, []
        self.cache = tmp_path / "models--org--name"
        self.snapshot = self.cache / "snapshots" / "abc"
        self.snapshot.mkdir(parents=True)
        (self.cache / "blobs").mkdir()

    def _get(self, name):
        blob = self.cache / "blobs" / f"blob-of-{name}"
        shutil.copyfile(self.source / name, blob)
        if not (self.snapshot / name).is_symlink():
            (self.snapshot / name).symlink_to(blob)

    def snapshot_download(self, repository, *, revision=None, allow_patterns):
        if repository != "org/name":
            raise LocalEntryNotFoundError("no such model")
        self.asked.append((repository, revision))
        for name in os.listdir(self.source):
            if name.endswith(".json"):
                self._get(name)
        return str(self.snapshot)

    def hf_hub_download(self, repository, name, *, revision):
        assert (repository, revision) == ("org/name", "abc")
        if not (self.source / name).exists():
            raise LocalEntryNotFoundError("no such file")
        self.asked.append(name)
        self._get(name)
        return str(self.snapshot / name)


@pytest.mark.parametrize("shards", [False, True])
def test_the_hub_is_asked_only_for_what_is_read(tmp_path, monkeypatch, shards):
    save_relatives(tmp_path, "llama", shards=shards)
    hub = Hub(tmp_path, tmp_path / "base")
    monkeypatch.setattr(locations, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(locations, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.chdir(tmp_path / "donor")
    with Checkpoint.open("org/name", revision="main") as opened:
        assert torch.equal(opened.tensor("lm_head.weight"), build("llama").lm_head.weight)
        assert hub.asked == [("org/name", "main"), opened.file_of("lm_head.weight")]
        lost = [name for name in opened.names if opened.file_of(name) != opened.file_of("lm_head.weight")]
        if shards:
            (tmp_path / "base" / opened.file_of(lost[0])).unlink()
            with pytest.raises(ActValueError, match=r"cannot be downloaded .*no such file"):
                opened.tensor(lost[0])
    with pytest.raises(ActValueError, match=r"other/name: cannot be opened, expected a folder .* or a Hub id"):
        Checkpoint.open("other/name")


def test_no_tensor_is_found_where_the_index_lies_about_the_file(tmp_path):
    write_shard(tmp_path / "a.safetensors", {})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    refused(tmp_path, "has no tensor 'x', expected one")
