"""`act-peft select`: a mask from scores."""

from __future__ import annotations

import argparse
from pathlib import Path

from act_peft.cli.files import NORMALIZE, SCOPE, add_output, check_output_file, output_file
from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

SUMMARY = "Select the channels with the highest scores."
EXAMPLE = "act-peft select scores.safetensors --density 0.2 --scope module --output mask.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "scores", type=Path, help="file of scores, from `act-peft localize`, or of a fitted transfer (its gains)"
    )
    parser.add_argument("--density", type=float, required=True, help="share of the channels to select, from 0 to 1")
    parser.add_argument("--scope", choices=("global", "module"), default="global", help=SCOPE)
    parser.add_argument("--normalize", choices=("none", "rms"), default="none", help=NORMALIZE)
    parser.add_argument(
        "--max-channels", type=int, metavar="N", help="at most N channels of each module, from 1 on (no limit)"
    )
    add_output(parser, what="file of the mask")


def run(arguments: argparse.Namespace) -> None:
    """Select and print what was written.

    Raises:
        ActValueError: the share is too small for a single channel.
    """
    check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing():
        from act_peft import ChannelScores, FittedTransfer
        from act_peft.disk import tensorfile
        from act_peft.fitting.storage import KIND

    is_fitted = tensorfile.kind_of(arguments.scores) == KIND
    scores = FittedTransfer.load(arguments.scores).gains if is_fitted else ChannelScores.load(arguments.scores)
    mask = scores.top(
        arguments.density,
        scope=arguments.scope,
        normalize=arguments.normalize,
        max_channels=arguments.max_channels,
    )
    if not mask.num_selected:
        raise ActValueError(
            f"density: got {arguments.density}, which selects none of {sum(mask.num_channels.values())} channels, "
            "expected one that selects some (a higher --density)"
        )
    with output_file(arguments.output, overwrite=arguments.overwrite) as path:
        mask.save(path)
    print(f"{arguments.output}: {mask}")
