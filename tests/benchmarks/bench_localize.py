"""How long `localize` takes, as a multiple of its floor.

The floor is one bare forward pass of each of the two models over the same batches (`model(**batch)` without gradients
and without a cache): localization cannot do with less. Both are measured alternately in one process, and the median
of the ratios is printed. On a CPU that others use too, the ratio of the processor times (the second figure) is the
steadier one.

    python tests/benchmarks/bench_localize.py --threads 1 --repeats 7
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from act_peft.localization import localize


def build_model(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).to(device=args.device, dtype=getattr(torch, args.dtype)).eval()


def build_batches(args: argparse.Namespace, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(args.batches):
        ids = torch.randint(args.vocab, (args.batch_size, args.length), generator=generator)
        labels = ids.clone()
        labels[:, : round(args.length * (1 - args.counted))] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def measure(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall time and processor time of one run, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--counted", type=float, default=1 / 3, help="share of the tokens that count")
    parser.add_argument(
        "--max-memory", type=int, help="bytes for outputs that wait; little makes the models take turns"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    base, donor = build_model(args, 0), build_model(args, 1)
    batches = build_batches(args)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                for model in (base, donor):
                    inputs = {name: value.to(args.device) for name, value in batch.items() if name != "labels"}
                    model(**inputs, use_cache=False)

    def localized() -> None:
        localize(base, donor, batches, max_memory=args.max_memory, show_progress=False)

    bare(), localized()  # warm-up
    runs = []
    for repeat in range(args.repeats):
        order = (bare, localized) if repeat % 2 == 0 else (localized, bare)
        measured = {work: measure(work, args.device) for work in order}
        runs.append((measured[bare], measured[localized]))
    for what, clock in (("wall", 0), ("processor", 1)):
        ratios = [localize_times[clock] / floor_times[clock] for floor_times, localize_times in runs]
        floor = statistics.median(floor_times[clock] for floor_times, _ in runs)
        print(
            f"{what} time: two bare forwards {floor:.3f} s, localize / floor {statistics.median(ratios):.3f} "
            f"(median of {args.repeats}; {min(ratios):.3f} to {max(ratios):.3f})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
