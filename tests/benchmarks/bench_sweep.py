"""How long `sweep` takes, as a multiple of the forward passes that it makes.

The floor is that many bare forward passes over the same batches (`model(**batch)` without labels, gradients and
cache): one of the base and one of the donor, and one of the base for every setting. Both are measured in turns in one
process, and the ratio of the best times is printed; on a CPU that others use too, that of the processor times is the
steadier one. What a sweep does besides: reading rows of the donor, copying rows, and loss and accuracy of the answers.

    python tests/benchmarks/bench_sweep.py --threads 1 --repeats 5
"""

from __future__ import annotations

import argparse
import sys
from operator import itemgetter

import torch
from bench_localize import build_batches, build_model, measure
from transformers import LlamaForCausalLM

from act_peft import localize, sweep
from act_peft.sweeps.sweep import DENSITIES, SCALES

TARGET = 1.1


def build_pair(args: argparse.Namespace) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    base, donor = build_model(args, 0), build_model(args, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return base, donor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batches", type=int, default=4, help="of the ability, and again as many of what is kept")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--counted", type=float, default=0.5, help="share of the tokens that are answers")
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, donor = build_pair(args)
    ability, keep = build_batches(args, 0), build_batches(args, 1)
    scores = localize(base, donor, ability, show_progress=False)

    def bare() -> None:
        inputs = [{n: t.to(args.device) for n, t in b.items() if n != "labels"} for b in (*ability, *keep)]
        with torch.no_grad():
            for model in (donor, *[base] * (1 + len(args.densities) * len(args.scales))):
                for batch in inputs:
                    model(**batch, use_cache=False)

    def whole() -> None:
        sweep(base, donor, scores, ability, keep, densities=args.densities, scales=args.scales, show_progress=False)

    measure(whole, args.device)
    floors, sweeps = [], []
    for _ in range(args.repeats):
        floors.append(measure(bare, args.device))
        sweeps.append(measure(whole, args.device))
        print(f"sweep {sweeps[-1][0]:.2f} s, bare forward passes {floors[-1][0]:.2f} s")
    tokens = 2 * args.batches * args.batch_size * args.length
    print(f"{len(args.densities) * len(args.scales)} settings, {tokens} tokens, {args.dtype} on {args.device}")
    wall, processor = (min(map(best, sweeps)) / min(map(best, floors)) for best in (itemgetter(0), itemgetter(1)))
    ratio = processor if args.device == "cpu" else wall
    verdict = "met" if ratio <= TARGET else "missed"
    print(f"sweep / forward passes: {wall:.3f} by wall, {processor:.3f} by processor   target {TARGET}   {verdict}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
