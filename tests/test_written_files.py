"""All that is written: permissions by the umask, nothing after an error of the disk, `overwrite=False` to the end."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from contextlib import contextmanager

import pytest
import torch

from act_peft import ActError, ChannelScores, combine, create_adapter, export_lora, fit, merge_checkpoint
from act_peft.channels.masks import ChannelMask
from tests.support.tiny_checkpoints import save_relatives
from tests.support.tiny_models import batch, build, build_relatives, random_mask

resource = pytest.importorskip("resource")


@pytest.fixture(scope="module")
def fitted():
    base, donor = build_relatives("llama")
    return fit(base, donor, [{"input_ids": batch()}], [{"input_ids": batch(seed=1)}])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_relatives(folder, "llama")
    random_mask(build("llama"), 0.2).save(folder / "mask")
    create_adapter(folder / "base", folder / "donor", folder / "mask", folder / "adapter")
    return folder


def of_scores(inputs, output, fitted, **settings):
    ChannelScores({"a": torch.ones(9000, dtype=torch.float64)}, 1).save(output)


def of_mask(inputs, output, fitted, **settings):
    ChannelMask({"a": torch.arange(9000)}, {"a": 9000}).save(output)


JOBS = {
    "create_adapter": lambda i, o, f, **s: create_adapter(i / "base", i / "donor", i / "mask", o, **s),
    "merge_checkpoint": lambda i, o, f, **s: merge_checkpoint(i / "base", i / "adapter", o, **s),
    "combine": lambda i, o, f, **s: combine([i / "adapter"], o, **s),
    "export_lora": lambda i, o, f, **s: export_lora(i / "adapter", o, base=i / "base", biases="modules_to_save", **s),
    "to_adapter": lambda i, o, f, **s: f.to_adapter(f.gains.top(0.5), o, base=i / "base", **s),
    "to_lora": lambda i, o, f, **s: f.to_lora(2, o, base=i / "base", **s),
    "merge of a fit": lambda i, o, f, **s: f.merge(i / "base", o, **s),
    "scores": of_scores,
    "mask": of_mask,
    "fitted": lambda i, o, f, **s: f.save(o),
}
FOLDERS = [name for name in JOBS if name not in ("scores", "mask", "fitted")]


@pytest.mark.parametrize("job", JOBS)
def test_permissions_follow_the_umask(inputs, fitted, tmp_path, job):
    before = os.umask(0o027)
    try:
        JOBS[job](inputs, tmp_path / "out", fitted)
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        expected = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == expected & ~0o027, path


@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk_leaves_nothing(inputs, fitted, tmp_path, job):
    with _small_files_only(), pytest.raises((ActError, OSError)):
        JOBS[job](inputs, tmp_path / "out", fitted)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("job", FOLDERS)
def test_what_appears_while_a_run_works_stays(inputs, fitted, tmp_path, monkeypatch, job):
    real = shutil.disk_usage

    def appear(folder):  # asked before anything is written
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        return real(folder)

    monkeypatch.setattr(shutil, "disk_usage", appear)
    with pytest.raises(ActError, match=r"out: exists, and did not when this run began"):
        JOBS[job](inputs, tmp_path / "out", fitted)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


@contextmanager
def _small_files_only():
    """No file may grow beyond a kilobyte."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
