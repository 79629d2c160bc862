"""`act-peft export-lora`: an ordinary LoRA adapter from an ACT adapter."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from act_peft.cli.files import TARGETS, add_output
from act_peft.cli.imports import importing
from act_peft.plain import one_line

SUMMARY = "Export an adapter as an ordinary LoRA adapter, for PEFT or a serving engine; exact, unless a rank is given."
EXAMPLE = "act-peft export-lora ability --output ability-vllm --target vllm --max-rank 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("adapter", help="adapter: folder or Hub id")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default="peft",
        help="the program that is to load it; engines get one rank for all modules, without biases (peft)",
    )
    parser.add_argument(
        "--max-rank", type=int, metavar="RANK", help="largest rank of a module (as many as channels: exact)"
    )
    parser.add_argument(
        "--uniform-rank", action="store_true", help="pad all modules with zeros to one rank; engines always get this"
    )
    parser.add_argument(
        "--biases",
        choices=("error", "modules_to_save", "lora_bias"),
        default="error",
        help="how to treat deltas of biases and norms, which have no LoRA form (error)",
    )
    parser.add_argument(
        "--base",
        help="checkpoint of the base: needed with --biases modules_to_save, otherwise for checks (the one that the "
        "adapter names, if it is on this machine)",
    )
    add_output(parser, what="folder of the LoRA adapter")


def run(arguments: argparse.Namespace) -> None:
    """Export and print what is written, before that its size, and what the rank costs."""
    with importing():
        from act_peft import export_lora

    with _printing():
        result = export_lora(
            arguments.adapter,
            arguments.output,
            target=arguments.target,
            max_rank=arguments.max_rank,
            uniform_rank=arguments.uniform_rank,
            biases=arguments.biases,
            base=arguments.base,
            overwrite=arguments.overwrite,
        )
    ranks = result.ranks.values()
    span = f"rank {max(ranks)}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    print(f"{arguments.output}: LoRA adapter of {len(ranks)} modules, {span}, {result.size / 1e6:.1f} MB")
    if result.error:
        worst = max(result.errors, key=lambda name: result.errors[name])
        print(
            f"  relative error {result.error:.4f}, at most {result.errors[worst]:.4f} ({one_line(worst)}); rank "
            f"{result.rank_for_5_percent} has 0.05"
        )


@contextmanager
def _printing() -> Iterator[None]:
    """Print what the export says while it works."""
    logger = logging.getLogger("act_peft.export")
    handler = logging.Handler()
    handler.emit = lambda record: print(record.getMessage(), flush=True)  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
