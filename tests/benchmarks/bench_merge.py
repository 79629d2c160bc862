"""What merging and creating on disk cost, beside `cp -r` and beside loading the models: ratios within one run.

    python tests/benchmarks/bench_merge.py [--folder FOLDER] [--repeats N] [--keep]

A 24-layer Qwen2-shaped pair (hidden 896, intermediate 4864, vocabulary 32000, bfloat16, three files, 830 MB each) is
made from a configuration. Every number is the best of the repeats, measured in turns. transformers 5 maps files: "load
both (mapped)" reads no weight at all and "(read)" sums every weight once; the third peer makes the same adapter with
both models loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from act_peft import ActConfig, ChannelMask, create_adapter, initialize_from_donor, merge_checkpoint
from act_peft.channels.kinds import channel_kind, num_channels

DENSITY = 0.05
MERGE_TARGET, MEMORY_TARGET, CREATE_TARGET = 1.5, 300, 0.1
SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "vocab_size": 32000,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def make_pair(folder: Path) -> None:
    """Write `base`, `donor` and `mask` into a folder."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    counts = {name: num_channels(m) for name, m in model.named_modules() if channel_kind(m) is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.02)
        model.save_pretrained(folder / "base", max_shard_size="310MB")
        for parameter in model.parameters():
            parameter.mul_(1.01)
        model.save_pretrained(folder / "donor", max_shard_size="310MB")
    channels = {n: torch.randperm(c, generator=generator)[: max(1, round(DENSITY * c))] for n, c in counts.items()}
    ChannelMask(channels, counts).save(folder / "mask")


def seconds(function: Callable[[], object], result: Path | None = None) -> float:
    """Time of one call; what it wrote is removed."""
    start = time.perf_counter()
    function()
    taken = time.perf_counter() - start
    if result is not None:
        shutil.rmtree(result)
    return taken


def load_both(folder: Path, use: Callable[[torch.nn.Module], object]) -> list[torch.nn.Module]:
    """Donor and base with transformers, which maps the files and reads nothing before the weights are used."""
    models = []
    for name in ("base", "donor"):
        models.append(AutoModelForCausalLM.from_pretrained(folder / name))
        use(models[-1])
    return models


def read(model: torch.nn.Module) -> None:
    """Read every weight once."""
    for parameter in model.parameters():
        parameter.sum()


def in_memory(folder: Path) -> None:
    """The adapter that `create_adapter` makes, the usual way: both models loaded, PEFT, `save_pretrained`."""
    base, donor = load_both(folder, lambda _: None)
    model = get_peft_model(base, ActConfig(channels=str(folder / "mask"), task_type="CAUSAL_LM"))
    initialize_from_donor(model, donor, transfer_scale=0.4)
    model.save_pretrained(folder / "memory")


def peak_memory(folder: Path) -> float:
    """Megabytes that a merge adds to the peak of a process that has only imported the library."""
    code = (
        "import re, sys; from act_peft import merge_checkpoint; peak = lambda: "
        "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); before = peak(); "
        "merge_checkpoint(*sys.argv[1:]); print(peak() - before)"
    )
    arguments = [str(folder / name) for name in ("base", "adapter", "measured")]
    output = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    shutil.rmtree(folder / "measured")
    return int(output.stdout) / 1024


def measure(folder: Path, repeats: int) -> bool:
    """Print all numbers; True if the targets are met."""
    adapter = folder / "adapter"
    create_adapter(folder / "base", folder / "donor", folder / "mask", adapter)
    jobs = {
        "cp -r base": (
            lambda: subprocess.run(["cp", "-r", folder / "base", folder / "cp"], check=True),
            folder / "cp",
        ),
        "merge_checkpoint": (lambda: merge_checkpoint(folder / "base", adapter, folder / "out"), folder / "out"),
        "load both (mapped)": (lambda: load_both(folder, lambda _: None), None),
        "load both (read)": (lambda: load_both(folder, read), None),
        "load both, save adapter": (lambda: in_memory(folder), folder / "memory"),
        "create_adapter": (
            lambda: create_adapter(folder / "base", folder / "donor", folder / "mask", folder / "new"),
            folder / "new",
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (job, result) in jobs.items():
            times[name].append(seconds(job, result))
    best = {name: min(taken) for name, taken in times.items()}
    for name, taken in best.items():
        print(f"{name:24} {taken:7.3f} s   median {statistics.median(times[name]):7.3f} s")
    rows = [
        ("merge / cp", best["merge_checkpoint"] / best["cp -r base"], MERGE_TARGET),
        ("peak memory of merge, MB", peak_memory(folder), MEMORY_TARGET),
        ("create / load (mapped)", best["create_adapter"] / best["load both (mapped)"], CREATE_TARGET),
        ("create / load (read)", best["create_adapter"] / best["load both (read)"], CREATE_TARGET),
        ("create / load and save", best["create_adapter"] / best["load both, save adapter"], CREATE_TARGET),
    ]
    for name, value, target in rows:
        print(f"{name:26} {value:7.2f}   target {target:6.1f}   {'met' if value <= target else 'missed'}")
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
    return all(value <= target for _, value, target in rows)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put 4 GB of files; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="leave the pair there, for the next run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        make_pair(folder)
        return 0 if measure(folder, arguments.repeats) else 1
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
