"""`act-peft localize`: score the channels of two models."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from act_peft.cli.examples import ExampleReader, add_examples, check_modules, device_of, join_processes
from act_peft.cli.files import add_output, check_output_file, output_file
from act_peft.cli.imports import importing
from act_peft.plain import one_line

SUMMARY = "Score every channel by how differently base and donor answer, on examples of the ability."
EXAMPLE = "act-peft localize --base org/base --donor org/donor --dataset ability.jsonl --output scores.safetensors"

_WHOLE = ""  # the name of the scores of the whole dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument(
        "--donor",
        required=True,
        help="its relative with the ability, or a PEFT adapter of the base with it: folder or Hub id",
    )
    parser.add_argument(
        "--score",
        choices=("activation", "weight", "attribution", "contrast"),
        default="activation",
        help="what a score measures: the difference of the outputs, the size of the weight change (without examples), "
        "by how much the loss falls, or the difference divided by that on --keep-dataset (activation)",
    )
    parser.add_argument(
        "--dataset",
        help="examples in one of TRL's formats: JSON(L) file, folder or Hub id; only --score weight needs none",
    )
    parser.add_argument(
        "--keep-dataset",
        help="with --score attribution or contrast: examples of a skill to keep; contrast needs them (none)",
    )
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="a column of --dataset, such as the domain or the language: the scores of each of its values in a file "
        "of its own, NAME.VALUE.safetensors for --output NAME.safetensors (none)",
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="only these modules, or one regular expression; '.*' takes every module (all linear and norm modules, "
        "without the output layer)",
    )
    parser.add_argument(
        "--exclude-modules", nargs="+", metavar="NAME", help="not these modules, or one regular expression (none)"
    )
    add_examples(parser, samples=1500, batch_size=4)
    add_output(parser, what="file of scores")
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Localize and print what was written."""
    _check_arguments(arguments)
    if arguments.by is None:
        check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing():
        from act_peft import localize
        from act_peft.channels.names import matches
        from act_peft.localization.candidates import left_out_by_default
        from act_peft.processes import process_index

    arguments.device = device_of(arguments)
    join_processes()
    reader = ExampleReader(arguments)
    groups, keep = _examples(arguments, reader)
    outputs = {value: _output_of(arguments, value) for value in groups}
    for path in outputs.values():
        check_output_file(path, overwrite=arguments.overwrite)
    base = reader.model(arguments.base)
    targets, excluded = _patterns(arguments.target_modules), _patterns(arguments.exclude_modules)
    check_modules(base, target_modules=targets, exclude_modules=excluded)
    data: dict[str, Any] = {}
    if keep is not None:
        data["keep_dataloader"] = reader.own_batches(keep, base, name=arguments.keep_dataset)
    if arguments.dataset is not None:
        names = {value: f"{arguments.dataset} {value}".rstrip() for value in groups}
        loaders = {value: reader.own_batches(found, base, name=names[value]) for value, found in groups.items()}
        data["dataloader"] = loaders[_WHOLE] if arguments.by is None else loaders
    found: Any = localize(
        base,
        reader.donor(arguments.donor),
        score=arguments.score,
        target_modules=targets,
        exclude_modules=excluded,
        **data,
    )
    if process_index():  # all processes have the same scores
        return
    for value, scores in (found if arguments.by is not None else {_WHOLE: found}).items():
        with output_file(outputs[value], overwrite=arguments.overwrite) as path:
            scores.save(path)
        channels = sum(len(values) for values in scores.values())
        seen = "by weight" if arguments.score == "weight" else f"{scores.num_tokens} tokens"
        print(f"{outputs[value]}: scores of {channels} channels in {len(scores)} modules, {seen}")
    if arguments.target_modules is None:
        left_out = [name for name in left_out_by_default(base) if not matches(name, excluded)]
        if left_out:
            print(f"left out: {one_line(', '.join(left_out))} (name them in --target-modules to score them)")


def _examples(arguments: argparse.Namespace, reader: ExampleReader) -> tuple[dict[str, Any], Any]:
    """The examples of the ability by the values of a column, and those of the data to keep."""
    keep = None if arguments.keep_dataset is None else reader.load(arguments.keep_dataset)
    if arguments.dataset is None:
        return {_WHOLE: None}, keep
    if arguments.by is None:
        return {_WHOLE: reader.load(arguments.dataset)}, keep
    return reader.load_by_column(arguments.dataset, arguments.by), keep


def _output_of(arguments: argparse.Namespace, value: str) -> Path:
    path: Path = arguments.output
    return path if arguments.by is None else path.with_name(f"{path.stem}.{value}{path.suffix}")


def _patterns(names: list[str] | None) -> list[str] | str | None:
    """What the library takes: a list of names, or a single regular expression (or `all-linear`) as text."""
    if names is None or len(names) > 1 or re.fullmatch(r"[\w.]+", names[0]):
        return names
    return names[0]


def _check_arguments(arguments: argparse.Namespace) -> None:
    """End like argparse, with status 2, if a dataset is missing or not used, or a regular expression is none."""
    for option in ("target_modules", "exclude_modules"):
        pattern = _patterns(getattr(arguments, option))
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            arguments.refuse(f"argument --{option.replace('_', '-')}: {pattern!r} is no regular expression ({error})")
    if arguments.score == "weight":
        if arguments.dataset is not None:
            arguments.refuse("argument --dataset: not used with --score weight")
        if arguments.by is not None:
            arguments.refuse("argument --by: not used with --score weight")
    elif arguments.dataset is None:
        arguments.refuse("the following arguments are required: --dataset")
    if arguments.score == "contrast" and arguments.keep_dataset is None:
        arguments.refuse("the following arguments are required with --score contrast: --keep-dataset")
    if arguments.keep_dataset is not None and arguments.score not in ("attribution", "contrast"):
        arguments.refuse(f"argument --keep-dataset: not used with --score {arguments.score}")
