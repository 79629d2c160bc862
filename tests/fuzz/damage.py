"""Damages: functions of a file and a random generator, which write it anew or put something else in its place."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path, random.Random], None]

HUGE = "10**5000"
VALUES = [
    *(None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**40, 10**399, 10**400, HUGE),
    *("", "x", "(", "(a+)+$", "../../../etc/passwd", "\x1b[31m", "\ud800", "a" * 10000, "nan", "all-linear", "LORA"),
    *([], {}, [None], [[1]], [{}], {"x": []}, {"": 1}, [0] * 1000, [-1], ["q_proj"], {"lm_head": 3}),
]
CONSTANTS = ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000]
CONTENTS = [
    *(
        b"",
        b" ",
        b"{}",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"[" * 99999,
        b'{"a":' * 50000,
        b"\x80\x02}q\x00.",
        b"\xff" * 64,
    ),
    *(b"PK\x03\x04" + bytes(60), b"{" * 999, bytes(8), b"\xef\xbb\xbf{}", "{}".encode("utf-16")),
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "F99",
    "",
    None,
    3,
    [],
]
SIZES = [0, 1, 2, 3, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1, 1.5, None, "x", []]


# ------------------------------------------------------------------------------------------------------- any file ---


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def lengthen(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 100)))


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    where = min(len(data), chance.choice([16, 800, len(data)]))
    for _ in range(chance.randrange(1, 9)):
        data[chance.randrange(where)] = chance.randrange(256)
    path.write_bytes(data)


def move_bytes(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    a, b, c = sorted(chance.randrange(len(data)) for _ in range(3))
    path.write_bytes(data[:a] + data[b:c] + data[a:b] + data[c:])


def replace(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.choice([*CONTENTS, chance.randbytes(999)]))


def mark_order(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(chance.choice([b"\xef\xbb\xbf" + data, b"\xff\xfe" + data, data[::2], data.hex().encode()]))


def no_file(path: Path, chance: random.Random) -> None:
    path.unlink()
    make: Any = chance.choice([None, os.mkfifo, os.mkdir])
    if make is not None:
        make(path)


def link(path: Path, chance: random.Random) -> None:
    target = chance.choice(["/etc/passwd", "/dev/zero", "/dev/stdin", path.name, "nothing", str(path.parent)])
    path.unlink()
    path.symlink_to(target)


def take_from_beside(path: Path, chance: random.Random) -> None:
    """The content of a different file of the same folder, or of one beside it."""
    files = sorted(p for p in [*path.parent.iterdir(), *path.parent.parent.rglob("*")] if p.is_file() and p != path)
    if files:
        shutil.copyfile(chance.choice(files), path)


# ----------------------------------------------------------------------------------------------------------- JSON ---


def spoil_json(value: Any, chance: random.Random) -> Any:
    """The value, in which now one value, key or level is different."""
    holder = value
    while True:
        if not isinstance(holder, (dict, list)) or not holder:
            return copy.deepcopy(chance.choice(VALUES))
        key = chance.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or chance.random() < 0.3:
            break
        holder = holder[key]
    what = chance.choice(["value", "value", "value", "delete", "rename", "add", "deeper", "swap"])
    if what == "delete":
        del holder[key]
    elif what == "deeper":
        for _ in range(chance.choice([1, 50, 150])):
            holder[key] = [holder[key]]
    elif what == "swap":
        other = chance.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif what in ("rename", "add") and isinstance(holder, dict):
        name = chance.choice(["", "x", f"{key}.x", str(key).upper(), "\ud800", "a" * 5000, "\x1b[2J\n# x"])
        holder[name] = holder[key] if what == "add" else holder.pop(key)
    elif isinstance(holder[key], int) and not isinstance(holder[key], bool) and chance.random() < 0.5:
        holder[key] += chance.choice([-1, 1, -holder[key], holder[key]])
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def to_text(value: Any) -> str:
    """JSON of a value, which may hold an integer that Python would not write."""
    return json.dumps(value).replace(f'"{HUGE}"', "1" + "0" * 5000)


def spoil_values(path: Path, chance: random.Random) -> None:
    value = json.loads(path.read_text())
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        value = spoil_json(value, chance)
    path.write_text(to_text(value))


def spoil_text(path: Path, chance: random.Random) -> None:
    """A key twice, a number that is none, a comma too many."""
    text = path.read_text().strip()
    places = [i for i, c in enumerate(text) if c in ":,{["]
    at = chance.choice(places) + 1 if places else 0
    new = chance.choice([*CONSTANTS, ",", "}", '"x":1,"x":2,', "//", "'"])
    if text.startswith("{") and chance.random() < 0.3:
        first = text[1:].lstrip().split(":")[0]
        path.write_text("{" + first + ": " + chance.choice(["3", "null", '"x"']) + ", " + text[1:])
    else:
        path.write_text(text[:at] + new + text[at:])


# ---------------------------------------------------------------------------------------------------- safetensors ---


def header_of(path: Path) -> tuple[Any, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, text: str, data: bytes) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def spoil_header(path: Path, chance: random.Random) -> None:
    header, data = header_of(path)
    names = sorted(set(header) - {"__metadata__"})
    entry = header[chance.choice(names)]
    what = chance.choice(["dtype", "shape", "offsets", "both", "overlap", "any", "any", "twice", "name"])
    if what == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    if what in ("shape", "both"):
        shape = entry["shape"] or [1]
        shape[chance.randrange(len(shape))] = chance.choice(SIZES)
        entry["shape"] = chance.choice([shape, shape, shape[::-1], [*shape, 1], [*shape, 0], [1, *shape], [1] * 99])
    if what in ("offsets", "both"):
        entry["data_offsets"][chance.randrange(2)] = chance.choice(SIZES)
    if what == "overlap":
        entry["data_offsets"] = list(header[chance.choice(names)]["data_offsets"])
    if what == "any":
        header = spoil_json(header, chance)
    if what == "name":
        name = chance.choice(names)
        header[chance.choice(["", "x", f"{name}.x", "../x", "\ud800", name.upper()])] = header.pop(name)
    text = to_text(header)
    if what == "twice":
        name = chance.choice(names)
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
    write_header(path, text, data)


def spoil_length(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    length = chance.choice([0, 1, 2, 7, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


def spoil_metadata(path: Path, chance: random.Random) -> None:
    """The JSON that act_peft keeps in the metadata of its files, or the metadata themselves."""
    header, data = header_of(path)
    metadata = header.setdefault("__metadata__", {})
    if "act_peft" in metadata and chance.random() < 0.8:
        inner = spoil_json(json.loads(metadata["act_peft"]), chance)
        text = to_text(inner)
        metadata["act_peft"] = chance.choice([text, text, text, text[:-1], "[" * 99999, text + "x"])
    else:
        header["__metadata__"] = chance.choice([3, [], None, "x", {"act_peft": 3}, {}, {"format": "tf"}])
    write_header(path, json.dumps(header), data)


def spoil_tensor(path: Path, chance: random.Random) -> None:
    """Other values, dtypes and shapes, in a file that is whole."""
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    if chance.random() < 0.5:
        name = chance.choice([n for n in sorted(tensors) if n.endswith("index")] or [name])
    old = tensors[name]
    flat = old.flatten()
    with_first = torch.cat([flat[:1], flat[:-1]]).reshape(old.shape) if old.numel() else old
    new = chance.choice(
        [
            *(None, old[:-1] if old.dim() else old, old[None], flat, flat[:0], old[..., :0], old.flip(0), with_first),
            *(old * 0 - 1, old + 1, old + 10**6, old - 10**6, -old, old * 0, torch.zeros(0), torch.tensor(1.0)),
            *(old.to(d) for d in (torch.float32, torch.float64, torch.int32, torch.bool, torch.uint8, torch.bfloat16)),
            *(
                flat.repeat(2),
                old.to(torch.float32) * float("nan"),
                old.to(torch.float32) / 0,
                old.to(torch.float8_e4m3fn),
            ),
        ]
    )
    del tensors[name]
    if new is not None:
        tensors[chance.choice([name] * 9 + [f"{name}.x"])] = new.clone().contiguous()
    if chance.random() < 0.1:
        tensors[chance.choice(["x", f"{name}.y", "base_model.model.lm_head.weight"])] = old.clone()
    header, _ = header_of(path)
    save_file(tensors, path, metadata=header.get("__metadata__"))


def lose_module(path: Path, chance: random.Random) -> None:
    """All tensors of one module, or all of one kind, are gone."""
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    part = chance.choice([name.rpartition(".")[0], name.rpartition(".")[2]])
    header, _ = header_of(path)
    save_file({n: t for n, t in tensors.items() if part not in n}, path, metadata=header.get("__metadata__"))


# ---------------------------------------------------------------------------------------------------------- JSONL ---


def spoil_line(path: Path, chance: random.Random) -> None:
    lines = path.read_text().splitlines()
    at = chance.randrange(len(lines))
    value = json.loads(lines[at])
    lines[at] = chance.choice(
        [to_text(spoil_json(value, chance)), lines[at][:-3], "", "[]", "3", "null", "\x00", "{" * 999]
    )
    path.write_text("\n".join(lines) + "\n")


ANY: list[Damage] = [cut, lengthen, flip, flip, move_bytes, replace, mark_order, no_file, link, take_from_beside]
JSON: list[Damage] = [spoil_values] * 12 + [spoil_text] * 3
TENSORS: list[Damage] = [spoil_header] * 6 + [spoil_tensor] * 10 + [lose_module] * 2 + [spoil_length, spoil_metadata]
OURS: list[Damage] = [*TENSORS, *[spoil_metadata] * 8]
LINES: list[Damage] = [spoil_line] * 6


def damages_of(path: Path) -> list[Damage]:
    """The damages that are tried on a file."""
    special = {".json": JSON, ".safetensors": TENSORS, ".jsonl": LINES}
    return ANY + special.get(path.suffix, OURS)
