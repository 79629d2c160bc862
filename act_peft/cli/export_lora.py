"""`act-peft export-lora`: an ordinary LoRA adapter from an ACT adapter."""

from __future__ import annotations

import argparse

from act_peft.cli.files import add_output
from act_peft.cli.imports import importing
from act_peft.plain import one_line

SUMMARY = "Export an adapter as an ordinary LoRA adapter; exact, unless a rank is given."
EXAMPLE = "act-peft export-lora ability --output ability-lora --max-rank 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("adapter", help="adapter: folder or Hub id")
    parser.add_argument(
        "--max-rank", type=int, metavar="RANK", help="largest rank of a module (as many as channels: exact)"
    )
    parser.add_argument("--uniform-rank", action="store_true", help="pad all modules with zeros to one rank")
    parser.add_argument(
        "--biases",
        choices=("error", "modules_to_save", "lora_bias"),
        default="error",
        help="how to treat deltas of biases and norms, which have no LoRA form (error)",
    )
    parser.add_argument("--base", help="checkpoint of the base, needed with --biases modules_to_save and only there")
    add_output(parser, what="folder of the LoRA adapter")


def run(arguments: argparse.Namespace) -> None:
    """Export and print what was written and what it costs."""
    with importing():
        from act_peft import export_lora

    result = export_lora(
        arguments.adapter,
        arguments.output,
        max_rank=arguments.max_rank,
        uniform_rank=arguments.uniform_rank,
        biases=arguments.biases,
        base=arguments.base,
        overwrite=arguments.overwrite,
    )
    ranks = result.ranks.values()
    print(f"{arguments.output}: LoRA adapter of {len(result.ranks)} modules, ranks {min(ranks)} to {max(ranks)}")
    for name, error in result.errors.items():
        if error:
            print(f"  {one_line(name)}: rank {result.ranks[name]}, relative error {error:.4f}")
