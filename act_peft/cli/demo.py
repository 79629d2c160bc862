"""`act-peft demo`: the whole method on two tiny models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from act_peft.cli.imports import importing

if TYPE_CHECKING:
    from act_peft.demo.run import DemoResult

SUMMARY = "Recover a forgotten language in a tiny model, in about a minute and without a network."
EXAMPLE = "act-peft demo --output act-peft-demo --density 0.5 --keep-weight 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; their defaults are those of `DemoSettings`."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write (act-peft-demo; with another seed act-peft-demo-SEED)",
    )
    parser.add_argument("--seed", type=int, help="seed of the order of the examples and of the random channels (0)")
    parser.add_argument("--density", type=float, help="share of the channels that is selected (0.5)")
    parser.add_argument(
        "--keep-weight", type=float, metavar="MU", help="how much a change on the skill to keep counts in the fit (3)"
    )
    parser.add_argument("--overwrite", action="store_true", help="run every step again")


def run(arguments: argparse.Namespace) -> None:
    """Run the demo and print its results."""
    with importing():
        from act_peft.demo.run import DemoSettings, run_demo

    given = {name: getattr(arguments, name) for name in ("seed", "density", "keep_weight")}
    settings = DemoSettings(**{name: value for name, value in given.items() if value is not None})
    own = "act-peft-demo" if settings.seed == 0 else f"act-peft-demo-{settings.seed}"
    result = run_demo(
        arguments.output or own, settings, report=lambda line: print(line, flush=True), overwrite=arguments.overwrite
    )
    print(_summary(result))


def _summary(result: DemoResult) -> str:
    """The table of accuracies, the sizes and the paths."""
    width = max(map(len, result.accuracies)) + 4
    lines = ["", "accuracy on test problems".ljust(width) + "Spanish    German     English"]
    lines.append(" " * width + "(recover)  (keep)     (untouched)")
    for name, row in result.accuracies.items():
        lines.append(name.ljust(width) + "".join(f"{value:<11.3f}" for value in row.values()).rstrip())
    lines += [
        "",
        "Fitted: the donor's difference in closed form, without labels or training. Then the best channels are",
        "fine-tuned briefly, with the base as teacher of German.",
        "Controls: the same fine-tune without the fit, and on randomly drawn channels.",
        "English is in no data, only in the donor.",
        f"Sizes: adapter {result.adapter_bytes / 1000:.0f} kB, checkpoint {result.checkpoint_bytes / 1000:.0f} kB.",
        "",
    ]
    lines += [f"{what:<10}{path}" for what, path in result.paths.items()]
    return "\n".join(lines)
