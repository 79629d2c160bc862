"""Tiny checkpoints and adapters on disk, for everything that reads and writes folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from act_peft import ActConfig
from tests.support.tiny_models import build, build_relatives, random_mask

SHARD_SIZE = "5KB"  # several files for every family and dtype


def save_relatives(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shards: bool = True) -> None:
    """`base` and `donor` in `folder`, and a mask of the base."""
    base, donor = build_relatives(family, dtype=dtype)
    for name, model in (("base", base), ("donor", donor)):
        model.save_pretrained(folder / name, max_shard_size=SHARD_SIZE if shards else "1GB")
    random_mask(base, 0.3).save(folder / "mask")


def save_adapter(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    density: float = 0.3,
    **settings,
) -> None:
    """A random adapter for the base of `save_relatives`."""
    base = build(family, dtype=dtype)
    torch.manual_seed(seed)
    mask = random_mask(base, density, seed=seed)
    if "channels" not in settings:
        settings["channels"] = mask
    model = get_peft_model(base, ActConfig(task_type="CAUSAL_LM", init_weights=False, **settings))
    model.save_pretrained(folder)


def write_shard(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def change_adapter(folder: Path, key: str, change) -> None:
    """Replace one tensor of an adapter's file (`change` gives None: remove it)."""
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    new = change(tensors.pop(key, None))
    if new is not None:
        tensors[key] = new
    save_file(tensors, path)
