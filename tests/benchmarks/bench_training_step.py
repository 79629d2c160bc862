"""A training step, its peak memory, and the unmerged forward, beside PEFT's own methods with as many parameters.

Floor of a step at density p of all linear rows: the frozen model costs 2 multiply-adds a weight and token (forward,
and the gradient of the inputs); ACT adds 3p of one pass (forward, gradient of the rows, gradient of the inputs). LoRA
with the same number of trainable parameters adds the same multiply-adds, and reads and writes every output once more.
With learned scales at density q a step adds 2q (forward, gradient of the inputs); its peer is LoRA of rank 8.
Nothing here is asserted: the numbers depend on the machine, the ratios hardly.

Every method runs in turn inside one process, `--repeats` rounds; printed is the median of the ratios of each round (of
processor time on a CPU, of wall time on an accelerator).
Peak memory is that of two steps in a fresh process per method, as Linux counts it.

    python tests/benchmarks/bench_training_step.py --threads 1
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from act_peft import ActConfig, ChannelMask

METHODS = ("act", "lora", "shira", "scales", "lora8", "base")
RANK = 8  # of the LoRA that learned scales are compared with
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_base(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=args.vocabulary,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)).to(args.device)


def build(method: str, args: argparse.Namespace) -> torch.nn.Module:
    base = build_base(args)
    modules = {n: m for n, m in base.named_modules() if n.rpartition(".")[2] in LINEAR}
    counts = {name: module.out_features for name, module in modules.items()}
    generator = torch.Generator().manual_seed(0)
    density = args.scales_density if method == "scales" else args.density
    channels = {n: torch.randperm(c, generator=generator)[: round(density * c)] for n, c in counts.items()}
    wanted = sum(len(channels[n]) * modules[n].in_features for n in modules)
    if method == "base":
        return base.requires_grad_(False)
    if method == "act":
        model = get_peft_model(base, ActConfig(channels=ChannelMask(channels, counts)))
    elif method == "scales":
        model = get_peft_model(base, ActConfig(channels=ChannelMask(channels, counts), trainable="scales"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "act_delta_weight" in name:
                    parameter.normal_(std=0.01)
    elif method == "lora8":
        model = get_peft_model(base, LoraConfig(r=RANK, target_modules=LINEAR, lora_dropout=0.0))
    elif method == "lora":
        rank = max(1, round(wanted / sum(m.in_features + m.out_features for m in modules.values())))
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=LINEAR, lora_dropout=0.0))
    else:
        rank = max(1, round(wanted / sum(m.in_features + m.out_features for m in modules.values())))
        model = get_peft_model(base, ShiraConfig(r=rank, target_modules=LINEAR))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"# {method}: {trained} trainable parameters (ACT's number: {wanted})", file=sys.stderr)
    return model


def make_step(model: torch.nn.Module, args: argparse.Namespace):
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length), device=args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model.train()
        if optimizer is None:
            return
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)

    return step, forward


def seconds(function, args: argparse.Namespace) -> float:
    """Processor time on a CPU, which others may use too; wall time on an accelerator."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    start = clock()
    function()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def compare(args: argparse.Namespace) -> None:
    runs = {method: make_step(build(method, args), args) for method in METHODS}
    steps = {method: [] for method in METHODS}
    forwards = {method: [] for method in METHODS}
    for _round in range(args.repeats + 1):  # the first one warms up
        for method, (step, _) in runs.items():
            steps[method].append(seconds(step, args))
    # Apart from the steps: a forward after a step finds another heap than one after none.
    for _round in range(args.repeats + 1):
        for method, (_, forward) in runs.items():
            forwards[method].append(seconds(forward, args))

    def ratio(table: dict[str, list[float]], method: str, peer: str) -> float:
        return statistics.median(a / b for a, b in zip(table[method][1:], table[peer][1:], strict=True))

    act, shira = ratio(steps, "act", "lora"), ratio(steps, "shira", "lora")
    print(f"training step, ratio to LoRA:    ACT {act:.3f}, SHiRA {shira:.3f}")
    scales = ratio(steps, "scales", "lora8")
    print(f"  of scales on {args.scales_density:.0%} of the rows, ratio to LoRA of rank {RANK}: {scales:.3f}")
    print(
        "unmerged forward, ratio to base: "
        + ", ".join(f"{name.upper()} {ratio(forwards, name, 'base'):.3f}" for name in ("act", "lora", "shira"))
    )


def peak(args: argparse.Namespace) -> None:
    memory = {}
    for method in METHODS:
        command = [sys.executable, __file__, "--only", method, *sys.argv[1:]]
        memory[method] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("peak memory of a process, MB:    " + ", ".join(f"{name.upper()} {mb:.0f}" for name, mb in memory.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--scales-density", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=METHODS, help="run two steps of one method and print the peak memory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        step, forward = make_step(build(args.only, args), args)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing and building
        for _ in range(2):
            step() if args.only != "base" else forward()
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024)
        return
    compare(args)
    peak(args)


if __name__ == "__main__":
    main()
