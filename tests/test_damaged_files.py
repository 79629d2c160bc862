"""Hundreds of damaged inputs from fixed seeds: each one is an error of our family, or does no harm."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_peft import ActError, create_adapter, merge_checkpoint
from tests.support.tiny_checkpoints import save_adapter, save_relatives

FILES = {
    "base": ["model.safetensors", "config.json"],
    "donor": ["model.safetensors", "config.json"],
    "sharded": ["model.safetensors.index.json", "first shard"],
    "a": ["adapter_model.safetensors", "adapter_config.json"],
}
SEEDS = 5
MAX_MEMORY = 100  # MB that all of it together may add; headers claim terabytes


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    save_relatives(folder / "many", "llama")
    save_relatives(folder, "llama", shards=False)
    shutil.move(folder / "many" / "base", folder / "sharded")
    save_adapter(folder / "a")
    return folder


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def lengthen(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 100)))


def flip_header_bytes(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.randrange(1, 9)):
        data[chance.randrange(min(len(data), 800))] = chance.randrange(256)
    path.write_bytes(data)


def claim_absurd_sizes(path: Path, chance: random.Random) -> None:
    def change(header: dict) -> None:
        entry = header[chance.choice(sorted(set(header) - {"__metadata__"}))]
        size = chance.choice([2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1])
        what = chance.choice(["shape", "data_offsets", "both"])
        if what != "data_offsets":
            entry["shape"][chance.randrange(len(entry["shape"]))] = size
        if what != "shape":
            entry["data_offsets"][1] = size

    _change_header(path, change, chance)


def change_dtype(path: Path, chance: random.Random) -> None:
    def change(header: dict) -> None:
        entry = header[chance.choice(sorted(set(header) - {"__metadata__"}))]
        entry["dtype"] = chance.choice(["F64", "BF16", "I32", "U8", "F99", "", None, 3, [], {}])

    _change_header(path, change, chance)


def rename_tensor(path: Path, chance: random.Random) -> None:
    def change(header: dict) -> None:
        name = chance.choice(sorted(set(header) - {"__metadata__"}))
        header[chance.choice(["", "x", name + ".x", "../x", "\ud800", name.upper()])] = header.pop(name)

    _change_header(path, change, chance)


def reshape_tensor(path: Path, chance: random.Random) -> None:
    def change(header: dict) -> None:
        entry = header[chance.choice(sorted(set(header) - {"__metadata__"}))]
        shape = entry["shape"]
        entry["shape"] = chance.choice([shape[::-1], [*shape, 1], [1, *shape], [*shape, 0], [], "x", None])

    _change_header(path, change, chance)


def claim_long_header(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    length = chance.choice([0, 1, 2, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


def replace_content(path: Path, chance: random.Random) -> None:
    path.write_bytes(
        chance.choice([b"", b"{}", b"[]", b"null", b"[" * 99999, b"\x80\x02}q\x00.", chance.randbytes(999)])
    )


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


def link_away(path: Path, chance: random.Random) -> None:
    target = chance.choice(["/etc/passwd", "/dev/zero", path.name, "nothing", str(path.parent), "../../mask"])
    path.unlink()
    path.symlink_to(target)


def make_no_file(path: Path, chance: random.Random) -> None:
    path.unlink()
    chance.choice([os.mkfifo, os.mkdir])(path)


def spoil_values(path: Path, chance: random.Random) -> None:
    """Another type in the place of one value of a JSON file."""
    content = json.loads(path.read_text())
    holder = content
    while True:
        key = chance.choice(sorted(holder))
        if not isinstance(holder[key], dict) or not holder[key] or chance.random() < 0.3:
            break
        holder = holder[key]
    holder[key] = chance.choice([None, "x", -1, 10**40, [], {}, {"x": []}, True, "../../../etc/passwd"])
    path.write_text(json.dumps(content))


def _change_header(path: Path, change, chance: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


ANY = [cut, lengthen, flip_header_bytes, replace_content, remove, link_away, make_no_file]
TENSORS = [claim_absurd_sizes, change_dtype, rename_tensor, reshape_tensor, claim_long_header]
MUST_FAIL = {cut, claim_absurd_sizes, claim_long_header, link_away, make_no_file}  # whatever was damaged
CASES = [
    (place, file, damage, seed)
    for place, files in FILES.items()
    for file in files
    for damage in [*ANY, *([spoil_values] if file.endswith("json") else TENSORS)]
    for seed in range(SEEDS)
]


def test_there_are_enough_cases():
    assert len(CASES) >= 300


@pytest.mark.parametrize("place", FILES)
def test_damaged_inputs_end_in_errors_of_the_family(originals, place, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed = 0
    for where, file, damage, seed in [case for case in CASES if case[0] == place]:
        if tmp_path.exists():
            shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for name in FILES:
            shutil.copytree(originals / name, tmp_path / name)
        if file == "first shard":
            file = sorted(name for name in os.listdir(tmp_path / where) if name.endswith(".safetensors"))[0]
        damage(tmp_path / where / file, random.Random(f"{where} {file} {damage.__name__} {seed}"))
        base = "sharded" if where == "sharded" else "base"
        adapters = tmp_path / "a"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if where == "donor":
                    create_adapter(tmp_path / base, tmp_path / "donor", originals / "mask", tmp_path / "out")
                else:
                    merge_checkpoint(tmp_path / base, adapters, tmp_path / "out")
            except ActError as error:
                failed += 1
                message = str(error)
            except BaseException as error:
                raise AssertionError(f"{where}/{file} after {damage.__name__}, seed {seed}: {error!r}") from error
            else:
                message = None
                harmless = file.endswith(".json") or damage not in MUST_FAIL
                assert harmless, (where, file, damage, seed)
                assert all(
                    torch.is_tensor(t) for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values()
                )
        assert set(os.listdir(tmp_path)) == set(FILES) | ({"out"} if message is None else set())
    assert failed > len([case for case in CASES if case[0] == place]) * 0.7
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MAX_MEMORY


def test_tensors_of_other_shapes_and_dtypes_in_a_whole_file_are_errors_too(originals, tmp_path):
    tensors = load_file(originals / "a" / "adapter_model.safetensors")
    for seed in range(40):
        chance = random.Random(seed)
        shutil.copytree(originals / "a", tmp_path / f"a{seed}")
        key = chance.choice(sorted(tensors))
        old = tensors[key]
        new = chance.choice(
            [old[:-1], old[None], old.flatten()[:0], old.to(torch.int32), old.to(torch.bool), old * 0 - 1]
        )
        if key.endswith("index") or new.shape != old.shape or not new.is_floating_point():
            save_file({**tensors, key: new.contiguous()}, tmp_path / f"a{seed}" / "adapter_model.safetensors")
            with pytest.raises(ActError):
                merge_checkpoint(originals / "base", tmp_path / f"a{seed}", tmp_path / "out")
