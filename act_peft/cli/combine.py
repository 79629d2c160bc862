"""`act-peft combine`: several adapters into one."""

from __future__ import annotations

import argparse
import json

from act_peft.cli.files import add_output
from act_peft.cli.imports import importing

SUMMARY = "Combine adapters of one base into one, with a weight each, and show the channels that they share."
EXAMPLE = "act-peft combine science law --weights 1 0.5 --combination-type ties --density 0.5 --output both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("adapter", nargs="+", help="adapters: folders or Hub ids")
    parser.add_argument("--weights", nargs="+", type=float, metavar="FACTOR", help="factor of each adapter (1)")
    parser.add_argument(
        "--combination-type",
        default="linear",
        metavar="TYPE",
        help="rule for shared channels: linear (= sum), mean, first, larger, ties, dare_linear, dare_ties or "
        "magnitude_prune (linear)",
    )
    parser.add_argument(
        "--density",
        type=float,
        help="share of the values of shared channels that pruning keeps; only for pruning types",
    )
    parser.add_argument(
        "--majority-sign-method",
        default="total",
        metavar="METHOD",
        help="for ties and dare_ties: total or frequency (total)",
    )
    parser.add_argument(
        "--base", help="checkpoint of the base; its fingerprint is recorded in the result (not recorded)"
    )
    parser.add_argument(
        "--report", action="store_true", help="show the conflicts of every module, not only the totals"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_output(parser, what="folder of the adapter")


def run(arguments: argparse.Namespace) -> None:
    """Combine and print what was written and where the adapters conflict."""
    with importing():
        from act_peft import combine

    result = combine(
        arguments.adapter,
        arguments.output,
        weights=arguments.weights,
        combination_type=arguments.combination_type,
        density=arguments.density,
        majority_sign_method=arguments.majority_sign_method,
        base=arguments.base,
        overwrite=arguments.overwrite,
    )
    report = result.conflicts if arguments.report else result.conflicts.only_totals()
    if arguments.json:
        written = {"output": str(arguments.output), "modules": result.num_modules, "channels": result.num_channels}
        print(json.dumps({**written, "conflicts": report.to_dict()}, indent=2))
        return
    print(f"{arguments.output}: adapter of {result.num_channels} channels in {result.num_modules} modules")
    if report.totals:
        print(report)
