"""Decoding token by token, batch 1: ACT unmerged, two stacked, merged, and LoRA of equal size, against the base.

A token costs the base one multiply-add a weight; ACT at density p of all linear rows adds p of that, LoRA with as many
parameters the same. What is left of the difference is the time of the calls themselves, which a GPU or
`torch.compile` hides and a small model does not. Nothing here is asserted: the numbers depend on the machine.

Every method decodes the same tokens in turn inside one process, `--repeats` rounds; printed is the median of the
ratios of each round (of processor time on a CPU, of wall time on an accelerator).

    python tests/benchmarks/bench_decode.py --threads 1
    python tests/benchmarks/bench_decode.py --threads 1 --compile
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_training_step import LINEAR, build_base
from peft import LoraConfig, get_peft_model
from transformers import StaticCache

from act_peft import ActConfig, ChannelMask

METHODS = ("base", "act", "two act", "merged act", "lora")


def random_mask(model: torch.nn.Module, density: float, seed: int) -> ChannelMask:
    counts = {n: m.out_features for n, m in model.named_modules() if n.rpartition(".")[2] in LINEAR}
    generator = torch.Generator().manual_seed(seed)
    return ChannelMask(
        {n: torch.randperm(c, generator=generator)[: round(density * c)] for n, c in counts.items()}, counts
    )


def build(method: str, args: argparse.Namespace) -> torch.nn.Module:
    base = build_base(args).eval().requires_grad_(False)
    masks = [random_mask(base, args.density, seed) for seed in range(2)]
    if method == "base":
        return base
    if method == "lora":
        modules = {n: m for n, m in base.named_modules() if n.rpartition(".")[2] in LINEAR}
        wanted = sum(len(masks[0][n]) * m.in_features for n, m in modules.items())
        rank = max(1, round(wanted / sum(m.in_features + m.out_features for m in modules.values())))
        return get_peft_model(base, LoraConfig(r=rank, target_modules=LINEAR, init_lora_weights=False)).eval()
    model = get_peft_model(base, ActConfig(channels=masks[0], init_weights=False))
    if method == "two act":
        model.add_adapter("second", ActConfig(channels=masks[1], init_weights=False))
        model.base_model.set_adapter(["default", "second"])
    return (model.merge_and_unload() if method == "merged act" else model).eval()


def make_decoder(model: torch.nn.Module, args: argparse.Namespace) -> Callable[[], float]:
    """A function that decodes `--tokens` tokens, given ones, and returns the seconds a token."""
    config = getattr(model, "config", None)
    cache = StaticCache(config=config, max_cache_len=args.tokens + 1)
    ids = torch.randint(0, args.vocabulary, (args.tokens, 1, 1), device=args.device)
    positions = torch.arange(args.tokens, device=args.device)[:, None, None]
    step = torch.compile(model) if args.compile else model
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    @torch.inference_mode()
    def decode() -> float:
        cache.reset()
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        for token, position in zip(ids, positions, strict=True):
            step(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return (clock() - start) / args.tokens

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compile every model with torch.compile")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=METHODS[1:])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    decoders = {method: make_decoder(build(method, args), args) for method in ("base", *args.methods)}
    for decode in decoders.values():  # warm up, compile
        decode()
    rounds = [{method: decode() for method, decode in decoders.items()} for _ in range(args.repeats)]
    base = statistics.median(times["base"] for times in rounds)
    print(f"{'compiled' if args.compile else 'eager'}: base {base * 1e3:.2f} ms a token; ratio to the base: ", end="")
    ratios = {m: statistics.median(times[m] / times["base"] for times in rounds) for m in args.methods}
    print(", ".join(f"{method} {ratio:.3f}" for method, ratio in ratios.items()))


if __name__ == "__main__":
    main()
