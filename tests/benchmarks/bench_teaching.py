"""What `KeepCallback` adds to a training step: asking the base each time with all logits, against its cached answers.

Floor from the second round on: one forward and one backward pass of the model on the batch to keep, and the output
layer at the answer tokens. Asked each time, there is a forward pass of the base more, and with all logits the output
layer at every token. Nothing here is asserted: the numbers depend on the machine, the ratios hardly.

The three ways take turns inside one process, `--repeats` rounds; printed is the median of the ratios of each round (of
processor time on a CPU, of wall time on an accelerator).

    python tests/benchmarks/bench_teaching.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from act_peft import ActConfig, KeepCallback

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).to(args.device)
    if args.method == "lora":
        return get_peft_model(model, LoraConfig(r=8, target_modules=LINEAR, task_type="CAUSAL_LM"))
    channels = {n: range(0, m.out_features, 20) for n, m in model.named_modules() if n.rpartition(".")[2] in LINEAR}
    return get_peft_model(model, ActConfig(channels={n: list(c) for n, c in channels.items()}, task_type="CAUSAL_LM"))


def make_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length), device=args.device)
    labels = ids.clone()
    labels[:, : args.length - round(args.answers * args.length)] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def simple(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The formula, written down as it stands: two forward passes, the logits of every token."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    answers = batch["labels"][:, 1:] != -100

    def log_probabilities() -> torch.Tensor:
        return model(**inputs, use_cache=False).logits[:, :-1][answers].float().log_softmax(-1)

    model.eval()
    with torch.no_grad(), model.disable_adapter():
        target = log_probabilities()
    model.train()
    F.kl_div(log_probabilities(), target, reduction="batchmean", log_target=True).backward()


def seconds(function, args: argparse.Namespace) -> float:
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    start = clock()
    function()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("act", "lora"), default="act")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--answers", type=float, default=0.25, help="share of the tokens that are answers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, batch = build(args), make_batch(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step_of(max_cached_tokens: int):
        keep = KeepCallback([batch], max_cached_tokens=max_cached_tokens)
        given = {"model": model, "optimizer": optimizer}
        keep.on_train_begin(None, SimpleNamespace(global_step=0), None, **given)
        return lambda: keep.on_step_begin(None, None, None, **given)

    ways = {
        "simple": lambda: simple(model, batch),
        "asked": step_of(0),
        "cached": step_of(10**9),
        "loss": lambda: model(**batch, use_cache=False).loss.backward(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.repeats + 2):  # the first ones check, fill the cache and warm up
        for name, way in ways.items():
            spent = seconds(way, args)
            if number > 1:
                times[name].append(spent)
            model.zero_grad(set_to_none=True)

    def ratio(above: tuple[str, ...], below: tuple[str, ...]) -> float:
        sums = [[sum(parts) for parts in zip(*(times[n] for n in names), strict=True)] for names in (above, below)]
        return statistics.median(a / b for a, b in zip(*sums, strict=True))

    print(f"the callback's part: cached / simple {ratio(('cached',), ('simple',)):.2f}, ", end="")
    print(f"asked each time, logits of answers only / simple {ratio(('asked',), ('simple',)):.2f}")
    print(
        f"forward and backward pass of the loss and the callback: {ratio(('loss', 'cached'), ('loss', 'simple')):.2f}"
    )


if __name__ == "__main__":
    main()
