"""`act-peft localize`: score the channels of two models."""

from __future__ import annotations

import argparse
import re
from typing import Any

from act_peft.cli.examples import add_examples, batches_of, device_of, load_model
from act_peft.cli.files import add_output, check_output_file, load_examples
from act_peft.cli.imports import importing

SUMMARY = "Score every channel by how differently base and donor answer, on examples of the ability."
EXAMPLE = "act-peft localize --base org/base --donor org/donor --dataset ability.jsonl --output scores.safetensors"


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
    check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing():
        from act_peft import localize
        from act_peft.channels.names import matches
        from act_peft.localization.candidates import left_out_by_default
        from act_peft.processes import process_index
        from act_peft.transfer.donors import is_adapter

    arguments.device = device_of(arguments)
    examples: dict[str, Any] = {
        name: load_examples(dataset, split=arguments.split, samples=arguments.samples, seed=arguments.seed)
        for name, dataset in (("dataloader", arguments.dataset), ("keep_dataloader", arguments.keep_dataset))
        if dataset is not None
    }

    base = load_model(arguments.base, arguments)
    data: dict[str, Any] = {
        name: batches_of(
            dataset,
            base,
            tokenizer=arguments.base,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            assistant_only=arguments.assistant_only,
            device=arguments.device,
        )
        for name, dataset in examples.items()
    }
    scores = localize(
        base,
        arguments.donor if is_adapter(arguments.donor) else load_model(arguments.donor, arguments),
        score=arguments.score,
        target_modules=_patterns(arguments.target_modules),
        exclude_modules=_patterns(arguments.exclude_modules),
        **data,
    )
    if process_index():  # all processes have the same scores
        return
    scores.save(arguments.output)
    channels = sum(len(values) for values in scores.values())
    seen = "by weight" if arguments.score == "weight" else f"{scores.num_tokens} tokens"
    print(f"{arguments.output}: scores of {channels} channels in {len(scores)} modules, {seen}")
    if arguments.target_modules is None:
        excluded = _patterns(arguments.exclude_modules)
        left_out = [name for name in left_out_by_default(base) if not matches(name, excluded)]
        if left_out:
            print(f"left out: {', '.join(left_out)} (name them in --target-modules to score them)")


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
    elif arguments.dataset is None:
        arguments.refuse("the following arguments are required: --dataset")
    if arguments.score == "contrast" and arguments.keep_dataset is None:
        arguments.refuse("the following arguments are required with --score contrast: --keep-dataset")
    if arguments.keep_dataset is not None and arguments.score not in ("attribution", "contrast"):
        arguments.refuse(f"argument --keep-dataset: not used with --score {arguments.score}")
