"""Saves that are killed at every step: `python -m tests.support.killed_saves FOLDER EVERY`.

A forked process saves a new adapter and kills itself at its n-th call of the system that Python reports, for every
n-th n. Prints how the folder looks afterwards, as JSON: label -> number of kills, and what a whole save leaves.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from peft import PeftModel, get_peft_model

from act_peft import ActConfig
from act_peft.disk import update
from tests.support.tiny_models import build, random_mask

FILES = ("adapter_model.safetensors", "adapter_config.json")
OTHERS = {"optimizer.pt": b"state", "checkpoint-1/trainer_state.json": b"{}"}


def model(seed: int) -> PeftModel:
    base = build("llama", seed=0)
    mask = random_mask(base, 0.3, seed=seed)
    return get_peft_model(base, ActConfig(channels=mask, init_weights=False, task_type="CAUSAL_LM"))


def fill(folder: Path, older: Path | None) -> None:
    """The folder before the save: with an older adapter, and files of others."""
    shutil.rmtree(folder, ignore_errors=True)
    if older is not None:
        shutil.copytree(older, folder)
        for name, content in OTHERS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def save_and_die(new: PeftModel, folder: Path, step: int) -> bool:
    """Whether the process was killed before it had saved."""
    child = os.fork()
    if not child:
        steps = itertools.count(1)

        def die(event: str, arguments: tuple[object, ...]) -> None:
            if event.split(".")[0] in ("open", "os", "shutil", "ctypes", "fcntl") and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        new.save_pretrained(str(folder))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def state(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    found = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return "old" if found == old else "new" if found == new else "nothing" if not found else f"mixed: {sorted(found)}"


def main(folder: Path, every: int, *, one_by_one: bool) -> None:
    older, newer, place = folder / "older", folder / "newer", folder / "place"
    place.mkdir()
    output, new = place / "output", model(2)
    model(1).save_pretrained(older)
    new.save_pretrained(newer)
    old_files, new_files = ({name: (where / name).read_bytes() for name in FILES} for where in (older, newer))
    if one_by_one:
        update.exchange = lambda *_: False
    seen: collections.Counter[str] = collections.Counter()
    for before in (None, older):
        for step in itertools.count(1, every):
            fill(output, before)
            killed = save_and_die(new, output, step)
            label = state(output, old_files, new_files)
            others = all((output / n).is_file() and (output / n).read_bytes() == c for n, c in OTHERS.items())
            seen[
                f"{'fresh' if before is None else 'existing'}: {label}{'' if before is None or others else ', lost'}"
            ] += 1
            if not killed:
                break
    new.save_pretrained(output)
    left = sorted(p.relative_to(place).as_posix() for p in place.rglob("*"))
    sys.stdout.write(json.dumps({"seen": seen, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), one_by_one=len(sys.argv) > 3)
