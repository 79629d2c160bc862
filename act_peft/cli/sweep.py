"""`act-peft sweep`: try densities and transfer scales."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from act_peft.cli.examples import add_examples, batches_of, device_of, load_model
from act_peft.cli.files import NORMALIZE, SCOPE, add_output, check_output_file, load_examples
from act_peft.cli.imports import importing

SUMMARY = "Try densities and transfer scales on held-out examples, without training, and recommend one of each."
EXAMPLE = (
    "act-peft sweep --base org/base --donor org/donor --scores scores.safetensors --dataset ability.jsonl "
    "--keep-dataset skill.jsonl --output sweep.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument(
        "--donor", required=True, help="its relative with the ability, or an adapter that has it: folder or Hub id"
    )
    parser.add_argument("--scores", type=Path, required=True, help="file of scores, from `act-peft localize`")
    parser.add_argument(
        "--dataset",
        required=True,
        help="held-out examples of the ability in one of TRL's formats: JSON(L) file, folder or Hub id",
    )
    parser.add_argument(
        "--keep-dataset", required=True, nargs="+", metavar="DATASET", help="held-out examples of each skill to keep"
    )
    parser.add_argument(
        "--densities",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="shares of the channels to try (0.01 0.02 0.05 0.1 0.2 0.4)",
    )
    parser.add_argument(
        "--scales", nargs="+", type=float, metavar="SCALE", help="transfer scales to try (0.2 0.4 0.6 0.8 1.0)"
    )
    parser.add_argument("--scope", choices=("global", "module"), default="global", help=SCOPE)
    parser.add_argument("--normalize", choices=("none", "rms"), default="none", help=NORMALIZE)
    parser.add_argument(
        "--max-drop", type=float, default=0.05, metavar="SHARE", help="accuracy that a skill to keep may lose (0.05)"
    )
    parser.add_argument(
        "--measure-donor", action="store_true", help="also measure the donor, which is loaded for this"
    )
    parser.add_argument("--figure", type=Path, metavar="PNG", help="picture to write (none)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_examples(parser, samples=300, batch_size=8)
    add_output(parser, what="JSON file of all numbers")
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Sweep, print the table and write it."""
    names = [Path(dataset).stem if Path(dataset).is_file() else dataset for dataset in arguments.keep_dataset]
    if len(set(names)) < len(names):
        arguments.refuse(f"argument --keep-dataset: got {', '.join(names)}, expected different names")
    for path in (arguments.output, arguments.figure):
        if path is not None:
            check_output_file(path, overwrite=arguments.overwrite)
    with importing():
        from act_peft import ChannelScores, sweep
        from act_peft.disk.atomic import write_file
        from act_peft.plots import check_matplotlib, plot_sweep

    if arguments.figure is not None:
        check_matplotlib()
    arguments.device = device_of(arguments)
    scores = ChannelScores.load(arguments.scores)

    base = load_model(arguments.base, arguments)

    def read(dataset: str) -> Any:
        return batches_of(
            load_examples(dataset, split=arguments.split, samples=arguments.samples, seed=arguments.seed),
            base,
            tokenizer=arguments.base,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            assistant_only=arguments.assistant_only,
            device=arguments.device,
        )

    grid = {name: getattr(arguments, name) for name in ("densities", "scales")}
    result = sweep(
        base,
        load_model(arguments.donor, arguments) if arguments.measure_donor else arguments.donor,
        scores,
        read(arguments.dataset),
        {name: read(dataset) for name, dataset in zip(names, arguments.keep_dataset, strict=True)},
        scope=arguments.scope,
        normalize=arguments.normalize,
        max_drop=arguments.max_drop,
        **{name: values for name, values in grid.items() if values is not None},
    )
    text = json.dumps(result.to_dict(), indent=2, allow_nan=False)
    write_file(arguments.output, f"{text}\n".encode())
    if arguments.figure is not None:
        plot_sweep(result, arguments.figure)
    print(text if arguments.json else result)
