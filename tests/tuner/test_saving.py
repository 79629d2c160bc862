"""An adapter's folder is saved whole or not at all, and what else lies in it stays."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from act_peft import ActConfig, ActModel, ActValueError
from act_peft.disk import hidden, update
from act_peft.tuner.registration import register
from tests.support.killed_runs import contents
from tests.support.killed_saves import FILES, model
from tests.support.tiny_data import build_tokenizer
from tests.support.tiny_models import build, random_mask

WAYS = ["at once"] * sys.platform.startswith("linux") + ["one by one"]
SAVED = {"README.md", *FILES}


@pytest.fixture(params=WAYS)
def _way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(update, "exchange", lambda *_: False)


def killed(folder, every, *more):
    """What `tests.support.killed_saves` reports."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.killed_saves", str(folder), str(every), *more]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


LEFT = ["output", *(f"output/{name}" for name in sorted([*SAVED, "checkpoint-1", "optimizer.pt"]))]
LEFT.insert(LEFT.index("output/checkpoint-1") + 1, "output/checkpoint-1/trainer_state.json")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="exchanges folders in one step on Linux only")
@pytest.mark.parametrize("every", [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_killed_at_any_step_a_save_leaves_the_older_or_the_newer_adapter(tmp_path, every):
    found = killed(tmp_path, every)
    assert set(found["seen"]) == {"fresh: nothing", "fresh: new", "existing: old", "existing: new"}
    assert found["left"] == LEFT
    assert every > 1 or sum(found["seen"].values()) > 150


@pytest.mark.slow
def test_killed_where_folders_cannot_be_exchanged_a_save_leaves_no_mixed_adapter(tmp_path):
    found = killed(tmp_path, 1, "one by one")
    whole = {"fresh: nothing", "fresh: new", "existing: old", "existing: new"}
    # Between two renames there is no configuration, so nothing can be loaded.
    unreadable = {"existing: mixed: ['adapter_model.safetensors']", "existing: nothing"}
    assert whole < set(found["seen"]) <= whole | unreadable
    assert found["left"] == LEFT


@pytest.mark.usefixtures("_way")
def test_files_of_others_stay(tmp_path):
    old, new = model(1), model(2)
    folder = tmp_path / "adapter"
    old.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nWhat I found out.\n")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "runs" / "today").mkdir(parents=True)
    (folder / "runs" / "today" / "events").write_bytes(b"log")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("optimizer.pt")
    os.chmod(folder, 0o750)
    with open(folder / "runs" / "today" / "events", "ab") as log:
        new.save_pretrained(folder)
        log.write(b", and more")
    new.save_pretrained(tmp_path / "expected")
    assert all((folder / name).read_bytes() == (tmp_path / "expected" / name).read_bytes() for name in FILES)
    assert "What I found out." in (folder / "README.md").read_text()
    assert (folder / "runs" / "today" / "events").read_bytes() == b"log, and more"
    assert (folder / "link").read_bytes() == b"state"
    assert (folder / "empty").is_dir()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert sorted(os.listdir(tmp_path)) == ["adapter", "expected"]
    assert set(os.listdir(folder)) == {*SAVED, "optimizer.pt", "runs", "empty", "link"}


@pytest.mark.usefixtures("_way")
def test_several_adapters_in_folders_of_their_own(tmp_path):
    two = model(1)
    two.add_adapter("second", ActConfig(channels=random_mask(build("llama"), 0.2, seed=5), task_type="CAUSAL_LM"))
    two.add_adapter("third", ActConfig(channels=random_mask(build("llama"), 0.1, seed=6), task_type="CAUSAL_LM"))
    two.save_pretrained(tmp_path / "both")
    before = contents(tmp_path / "both" / "third")
    two.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    assert contents(tmp_path / "both" / "third") == before
    assert set(os.listdir(tmp_path / "both")) == {*SAVED, "second", "third"}
    assert set(os.listdir(tmp_path / "both" / "second")) == SAVED


def test_the_folder_in_which_a_process_works_stays_the_same_folder(tmp_path, monkeypatch):
    model(1).save_pretrained(tmp_path)
    before = os.stat(tmp_path).st_ino
    monkeypatch.chdir(tmp_path)
    model(2).save_pretrained(".")
    assert os.stat(tmp_path).st_ino == before
    assert set(os.listdir(".")) == SAVED
    assert PeftModel.from_pretrained(build("llama"), ".").peft_config


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    model(1).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert set(os.listdir(tmp_path / "real")) == SAVED


@pytest.mark.parametrize("full", ["very many files", "a pipe", "a different run inside"])
def test_where_a_folder_is_not_linked_it_stays_the_same_folder(tmp_path, monkeypatch, full):
    folder = tmp_path / "adapter"
    folder.mkdir()
    if full == "very many files":
        monkeypatch.setattr(update, "_MOST", 3)
        for number in range(4):
            (folder / f"{number}.txt").write_text("x")
    elif full == "a pipe":
        os.mkfifo(folder / "pipe")
    inside = (folder / "sub") if full == "a different run inside" else None
    before = os.stat(folder).st_ino
    if inside is None:
        model(1).save_pretrained(folder)
    else:
        with hidden.hidden_folder(folder) as other:
            model(1).save_pretrained(folder)
            assert other.path.is_dir()
    assert os.stat(folder).st_ino == before
    assert set(os.listdir(folder)) >= SAVED
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_folder_that_somebody_else_has_locked_is_saved_without_an_exchange(tmp_path, monkeypatch):
    model(1).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(update, "_PATIENCE", 0.05)
    lock = hidden.lock_of(tmp_path / "adapter")
    try:
        model(2).save_pretrained(tmp_path / "adapter")
    finally:
        hidden.unlock(lock)
    model(2).save_pretrained(tmp_path / "expected")
    assert (tmp_path / "adapter" / FILES[0]).read_bytes() == (tmp_path / "expected" / FILES[0]).read_bytes()


def test_what_another_process_writes_meanwhile_stays(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    model(1).save_pretrained(folder)
    (folder / "state").write_bytes(b"older")
    exchange = update.exchange

    def later(*names):
        (folder / "rng_state_1.pth").write_bytes(b"late")
        (folder / "state.new").write_bytes(b"newer")
        os.replace(folder / "state.new", folder / "state")
        return exchange(*names)

    monkeypatch.setattr(update, "exchange", later)
    model(2).save_pretrained(folder)
    assert (folder / "rng_state_1.pth").read_bytes() == b"late"
    assert (folder / "state").read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.usefixtures("_way")
def test_a_full_disk_leaves_the_older_adapter_and_nothing_else(tmp_path):
    old, new = model(1), model(2)
    old.save_pretrained(tmp_path / "adapter")
    before = contents(tmp_path / "adapter")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[FILES[0]]) // 2, limits[1]))
    try:
        with pytest.raises(ActValueError, match=r"cannot be written .* the folder is as it was"):
            new.save_pretrained(tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(tmp_path / "adapter") == before
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_everything_honours_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        model(1).save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(before)
    for path in (tmp_path / "adapter").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "adapter").stat().st_mode) == 0o777 & ~umask


def test_only_the_main_process_writes(tmp_path):
    model(1).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter" / FILES[0]).exists()


def test_models_without_an_act_adapter_are_saved_by_peft_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("act_peft.tuner.saving.updated_folder", lambda *_, **__: pytest.fail("not ours"))
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora" / FILES[0]).is_file()


def test_a_second_registration_does_not_wrap_twice(tmp_path):
    register(ActConfig, ActModel)
    method = PeftModel.save_pretrained
    assert not hasattr(method.saves_whole_folders, "saves_whole_folders")
    model(1).save_pretrained(tmp_path / "adapter")
    assert set(os.listdir(tmp_path / "adapter")) == SAVED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries below TRL
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_trainer_saves_checkpoints_and_its_result_beside_them(tmp_path):
    settings = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        logging_strategy="no",
    )
    rows = Dataset.from_list([{"prompt": "one plus two ", "completion": "is three"}] * 4)
    trainer = SFTTrainer(model(1), args=settings, train_dataset=rows, processing_class=build_tokenizer())
    trainer.train()
    trainer.save_model()
    assert {"checkpoint-1", "checkpoint-2", *SAVED} <= set(os.listdir(tmp_path / "run"))
    assert {"optimizer.pt", "trainer_state.json", *SAVED} <= set(os.listdir(tmp_path / "run" / "checkpoint-1"))
    hidden_ones = [path for path in tmp_path.rglob("*") if path.name.startswith(".act_peft")]
    assert hidden_ones == []
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "run")
    for name, parameter in again.named_parameters():
        if "act_delta" in name:
            assert torch.equal(parameter, trainer.model.get_parameter(name))
