"""`act-peft merge`: adapters into a checkpoint on disk."""

from __future__ import annotations

import argparse

from act_peft.cli.files import add_output
from act_peft.cli.imports import importing

SUMMARY = "Merge adapters into a checkpoint, at the cost of copying it, without loading the model."
EXAMPLE = "act-peft merge --base org/base --adapter ability --output merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="checkpoint of the base: folder or Hub id")
    parser.add_argument(
        "--adapter", required=True, action="append", metavar="DIR", help="adapter: folder or Hub id; may be repeated"
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", type=float, nargs="+", metavar="FACTOR", help="factor of each --adapter, in order (1)"
    )
    weights.add_argument(  # up to version 0.1
        "--weight", type=float, action="append", dest="weights", metavar="FACTOR", help="the same, one at a time (1)"
    )
    parser.add_argument(
        "--safe-merge", action="store_true", help="refuse a result with values that are not finite (a warning)"
    )
    add_output(parser, what="folder of the merged checkpoint")


def run(arguments: argparse.Namespace) -> None:
    """Merge and print what was written."""
    with importing():
        from act_peft import merge_checkpoint

    merge_checkpoint(
        arguments.base,
        arguments.adapter,
        arguments.output,
        weights=arguments.weights,
        safe_merge=arguments.safe_merge,
        overwrite=arguments.overwrite,
        show_progress=True,
    )
    size = sum(file.stat().st_size for file in arguments.output.iterdir() if file.is_file())
    print(f"{arguments.output}: merged checkpoint, {size / 1e6:.1f} MB")
