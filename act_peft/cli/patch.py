"""`act-peft patch`: what exchanged activations do to the loss."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from act_peft.cli.examples import ExampleReader, add_examples, device_of
from act_peft.cli.files import NORMALIZE, SCOPE_OF_MODULES, add_output, check_output_file, output_file
from act_peft.cli.imports import importing

SUMMARY = "Exchange the activations of selected channels between base and donor: do they suffice for the ability?"
EXAMPLE = "act-peft patch --base org/base --donor org/donor --scores scores.safetensors --dataset heldout.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument(
        "--donor", required=True, help="its relative with the ability, or an adapter that has it: folder or Hub id"
    )
    selection = parser.add_mutually_exclusive_group(required=True)
    selection.add_argument(
        "--scores",
        type=Path,
        help="file of scores: masks of growing density are selected from them (give these or --mask)",
    )
    selection.add_argument(
        "--mask", type=Path, nargs="+", metavar="FILE", help="files of masks in their place (give these or --scores)"
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="examples of the ability that the channels were not selected on, in one of TRL's formats: JSON(L) file, "
        "folder or Hub id",
    )
    parser.add_argument(
        "--densities",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="with --scores: densities of the masks (0.01 0.05 0.1 0.2 0.5)",
    )
    parser.add_argument("--scope", choices=("global", "module"), default="module", help=SCOPE_OF_MODULES)
    parser.add_argument("--normalize", choices=("none", "rms"), default="none", help=NORMALIZE)
    parser.add_argument(
        "--random-draws", type=int, default=1, help="random masks for each mask, as many channels of every module (1)"
    )
    parser.add_argument(
        "--positions",
        choices=("answer", "all"),
        default="answer",
        help="where activations are exchanged: where answer tokens are predicted, or everywhere (answer)",
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="picture to write: PNG, SVG or PDF (none)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_examples(parser, samples=200, batch_size=8)
    add_output(parser, what="JSON file of all numbers", required=False)
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Patch, print the table, and write the numbers."""
    if arguments.densities is not None and arguments.scores is None:
        arguments.refuse("argument --densities: not used with --mask")
    for path in (arguments.output, arguments.figure):
        if path is not None:
            check_output_file(path, overwrite=arguments.overwrite)
    with importing():
        from act_peft import ChannelMask, ChannelScores
        from act_peft.analysis import patch_channels
        from act_peft.plots import check_figure_file, draw_sufficiency, save_figure

    if arguments.figure is not None:
        check_figure_file(arguments.figure)
    arguments.device = device_of(arguments)
    selection: Any
    if arguments.scores is not None:
        selection = ChannelScores.load(arguments.scores)
    else:
        selection = {str(path): ChannelMask.load(path) for path in arguments.mask}
    reader = ExampleReader(arguments)
    examples = reader.load(arguments.dataset)
    base = reader.model(arguments.base)
    batches = reader.batches(examples, base, name=arguments.dataset)
    found = patch_channels(
        base,
        reader.donor(arguments.donor),
        batches,
        selection,
        densities=arguments.densities,
        scope=arguments.scope,
        normalize=arguments.normalize,
        random_draws=arguments.random_draws,
        positions=arguments.positions,
        seed=arguments.seed,
    )
    text = json.dumps(found.to_dict(), indent=2, allow_nan=False)
    if arguments.output is not None:
        with output_file(arguments.output, overwrite=arguments.overwrite) as path:
            path.write_text(f"{text}\n", encoding="utf-8")
    if arguments.figure is not None:
        with output_file(arguments.figure, overwrite=arguments.overwrite) as path:
            save_figure(draw_sufficiency(found), path)
    print(text if arguments.json else found)
