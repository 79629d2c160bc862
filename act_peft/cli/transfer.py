"""`act-peft transfer`: an adapter from two checkpoints on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from act_peft.cli.files import add_output
from act_peft.cli.imports import importing

SUMMARY = "Make an adapter from the donor's difference in the selected channels, without loading a model."
EXAMPLE = "act-peft transfer --base org/base --donor org/donor --mask mask.safetensors --output ability"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="checkpoint of the base: folder or Hub id")
    parser.add_argument("--donor", required=True, help="checkpoint of the donor: folder or Hub id")
    parser.add_argument("--mask", type=Path, required=True, help="file of the mask, from `act-peft select`")
    parser.add_argument(
        "--transfer-scale",
        type=float,
        default=0.4,
        metavar="SCALE",
        help="share of the donor's difference that is added (0.4)",
    )
    add_output(parser, what="folder of the adapter")


def run(arguments: argparse.Namespace) -> None:
    """Make the adapter and print what was written."""
    with importing():
        from act_peft import create_adapter

    create_adapter(
        arguments.base,
        arguments.donor,
        arguments.mask,
        arguments.output,
        transfer_scale=arguments.transfer_scale,
        overwrite=arguments.overwrite,
        show_progress=True,
    )
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    print(f"{arguments.output}: adapter, {size / 1e6:.1f} MB")
