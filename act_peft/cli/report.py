"""`act-peft report`: one page about some files."""

from __future__ import annotations

import argparse
from pathlib import Path

from act_peft.cli.files import SCOPE_OF_MODULES, add_output, check_output_file, output_file
from act_peft.cli.imports import importing

SUMMARY = "Write one HTML page about scores, masks, adapters, sweeps and patching: pictures, tables, provenance."
EXAMPLE = "act-peft report scores.safetensors mask.safetensors ability sweep.json --output report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="file of scores, a mask or a fitted transfer; folder of an adapter; JSON of a sweep or of patching",
    )
    parser.add_argument("--title", default="Where an ability sits", help="title of the page (Where an ability sits)")
    parser.add_argument(
        "--density", type=float, default=0.05, help="share of the channels that is selected from scores (0.05)"
    )
    parser.add_argument("--scope", choices=("global", "module"), default="module", help=SCOPE_OF_MODULES)
    add_output(parser, what="HTML page")


def run(arguments: argparse.Namespace) -> None:
    """Write the page and print its name."""
    check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing(library=False):
        from act_peft.report import write_report

    with output_file(arguments.output, overwrite=arguments.overwrite) as path:
        write_report(
            arguments.files,
            path,
            title=arguments.title,
            density=arguments.density,
            scope=arguments.scope,
        )
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: report on {len(arguments.files)} files, {size / 1e6:.1f} MB")
