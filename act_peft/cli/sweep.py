"""`act-peft sweep`: what to take of a donor, and how much."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from act_peft.cli.examples import ExampleReader, add_examples, device_of, join_processes
from act_peft.cli.files import NORMALIZE, SCOPE, add_output, check_output_file, output_file
from act_peft.cli.imports import importing
from act_peft.cli.next_steps import next_steps
from act_peft.errors import ActValueError

SUMMARY = "Try parts of the donor's difference on held-out examples, without training, and recommend one."
EXAMPLE = "act-peft sweep --base org/base --donor org/donor --dataset ability.jsonl --keep-dataset skill.jsonl"
_METHODS = (
    "channels",
    "interpolation",
    "layer-swap",
    "lines",
    "ties",
    "dare",
    "fitted",
    "fitted-rows",
    "fitted-rank",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument(
        "--donor", required=True, help="its relative with the ability, or an adapter that has it: folder or Hub id"
    )
    parser.add_argument(
        "--scores",
        type=Path,
        help="file of scores, from `act-peft localize`: try the channels that score highest (none)",
    )
    parser.add_argument(
        "--fit", action="store_true", help="with --scores: try fits and rules of weights too (always without --scores)"
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="held-out examples of the ability in one of TRL's formats: JSON(L) file, folder or Hub id; if fits are "
        "tried without --fit-dataset, half of them are fitted on",
    )
    parser.add_argument(
        "--keep-dataset", required=True, nargs="+", metavar="DATASET", help="the same of each skill to keep"
    )
    parser.add_argument(
        "--fit-dataset", metavar="DATASET", help="other examples of the ability, to fit on (half of --dataset)"
    )
    parser.add_argument(
        "--fit-keep-dataset", nargs="+", metavar="DATASET", help="the same of each skill to keep (half of them)"
    )
    parser.add_argument(
        "--max-keep-loss",
        type=float,
        metavar="NATS",
        help="how much the loss on a kept skill may rise, in nats per token (0.03)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="in its place: token accuracy that a kept skill may lose (with --scores alone: 0.05)",
    )
    parser.add_argument("--methods", nargs="+", choices=_METHODS, help="what is tried (everything)")
    parser.add_argument(
        "--densities",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="shares to try, of the channels by scores (0.01 0.02 0.05 0.1 0.2 0.4) and of a fit's rows (0.1 0.2 0.4)",
    )
    parser.add_argument(
        "--scales", nargs="+", type=float, metavar="SCALE", help="transfer scales to try (0.2 0.4 0.6 0.8 1.0)"
    )
    parser.add_argument(
        "--keep-weights", nargs="+", type=float, metavar="WEIGHT", help="first keep weights of fits (0.3 1 3 10)"
    )
    parser.add_argument("--ranks", nargs="+", type=int, metavar="RANK", help="ranks of LoRA adapters (16 64)")
    parser.add_argument("--scope", choices=("global", "module"), default="global", help=SCOPE)
    parser.add_argument("--normalize", choices=("none", "rms"), default="none", help=NORMALIZE)
    parser.add_argument(
        "--measure-donor", action="store_true", help="also measure the donor, which is loaded for this"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="picture to write: PNG, SVG or PDF (none)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_examples(parser, samples=300, batch_size=8)
    add_output(parser, what="JSON file of all numbers", required=False)
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Sweep, print the table and what to do next, and write the numbers."""
    names = [Path(dataset).stem if Path(dataset).is_file() else dataset for dataset in arguments.keep_dataset]
    if len(set(names)) < len(names):
        arguments.refuse(f"argument --keep-dataset: got {', '.join(names)}, expected different names")
    if (arguments.fit_dataset is None) != (arguments.fit_keep_dataset is None):
        arguments.refuse("argument --fit-dataset: expected together with --fit-keep-dataset")
    for path in (arguments.output, arguments.figure):
        if path is not None:
            check_output_file(path, overwrite=arguments.overwrite)
    with importing():
        from act_peft import ChannelScores, sweep
        from act_peft.plots import check_figure_file, draw_sweep, save_figure
        from act_peft.processes import process_index
        from act_peft.transfer.donors import is_adapter

    if arguments.figure is not None:
        check_figure_file(arguments.figure)
    arguments.device = device_of(arguments)
    join_processes()
    scores = None if arguments.scores is None else ChannelScores.load(arguments.scores)
    reader = ExampleReader(arguments)
    held_out, to_fit = _examples(arguments, reader)
    base = reader.model(arguments.base)

    def read(datasets: list[str], examples: list[Any]) -> list[Any]:
        pairs = zip(datasets, examples, strict=False)  # nothing to fit on, in the second call
        return [reader.own_batches(found, base, name=name) for name, found in pairs]

    used = [arguments.dataset, *arguments.keep_dataset]
    other = [arguments.fit_dataset, *(arguments.fit_keep_dataset or [])]
    held_out = read(used, held_out)
    to_fit = read(used if arguments.fit_dataset is None else other, to_fit)
    options = ("densities", "scales", "methods", "keep_weights", "ranks", "max_drop", "max_keep_loss")
    whole = arguments.measure_donor or (_compares(arguments) and not is_adapter(arguments.donor))
    result = sweep(
        base,
        reader.model(arguments.donor) if whole else arguments.donor,
        scores,
        held_out[0],
        dict(zip(names, held_out[1:], strict=True)),
        scope=arguments.scope,
        normalize=arguments.normalize,
        fit_ability_dataloader=to_fit[0] if to_fit else None,
        fit_keep_dataloader={str(n): found for n, found in enumerate(to_fit[1:])} if to_fit else None,
        **{name: getattr(arguments, name) for name in options},
    )
    if process_index():  # all processes have the same result
        return
    text = json.dumps(result.to_dict(), indent=2, allow_nan=False)
    if arguments.output is not None:
        with output_file(arguments.output, overwrite=arguments.overwrite) as path:
            path.write_text(f"{text}\n", encoding="utf-8")
    if arguments.figure is not None:
        with output_file(arguments.figure, overwrite=arguments.overwrite) as path:
            save_figure(draw_sweep(result, note=f"seed {arguments.seed}"), path)
    print(text if arguments.json else "\n".join([str(result), *next_steps(result, arguments)]))


def _compares(arguments: argparse.Namespace) -> bool:
    """Whether anything but scored channels is tried, for which the donor must be in memory."""
    if arguments.methods is not None:
        return any(method != "channels" for method in arguments.methods)
    return arguments.scores is None or _fits(arguments)


def _fits(arguments: argparse.Namespace) -> bool:
    """Whether there must be examples to fit on."""
    if arguments.fit or arguments.fit_dataset is not None:
        return True
    if arguments.methods is not None:
        return any(method.startswith("fitted") for method in arguments.methods)
    return arguments.scores is None


def _examples(arguments: argparse.Namespace, reader: ExampleReader) -> tuple[list[Any], list[Any]]:
    """The held-out examples of the ability and of every skill, and those to fit on (or none)."""

    def load(names: list[str]) -> list[Any]:
        return [reader.load(name) for name in names]

    found = load([arguments.dataset, *arguments.keep_dataset])
    if not _fits(arguments):
        return found, []
    if arguments.fit_dataset is not None:
        return found, load([arguments.fit_dataset, *arguments.fit_keep_dataset])
    halves = [_halves(examples, arguments.seed) for examples in found]
    return [held_out for held_out, _ in halves], [to_fit for _, to_fit in halves]


def _halves(examples: Any, seed: int) -> tuple[Any, Any]:
    count = len(examples)
    if count < 4:
        raise ActValueError(
            f"dataset: got {count} examples, expected at least 4, half of which are held out (or name others to fit "
            "on with --fit-dataset and --fit-keep-dataset)"
        )
    drawn = examples.shuffle(seed=seed)
    return drawn.select(range(count // 2)), drawn.select(range(count // 2, count))
