"""`act-peft fit`: which part of the donor's difference to take, in closed form."""

from __future__ import annotations

import argparse
from typing import Any

from act_peft.cli.examples import ExampleReader, add_examples, check_modules, device_of, join_processes
from act_peft.cli.files import add_output, check_output_file, output_file
from act_peft.cli.imports import importing

SUMMARY = "Fit the base to the donor's outputs on examples of the ability, without training."
EXAMPLE = (
    "act-peft fit --base org/base --donor org/donor --dataset ability.jsonl --keep-dataset kept.jsonl "
    "--output fitted.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument(
        "--donor",
        required=True,
        nargs="+",
        help="its relative with the ability, or a PEFT adapter of the base that has it: folder or Hub id; or several",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        help="examples of the ability in one of TRL's formats: JSON(L) file, folder or Hub id; one for each donor",
    )
    parser.add_argument(
        "--keep-dataset", nargs="+", metavar="DATASET", help="examples of what is to be kept, of the same kinds (none)"
    )
    parser.add_argument(
        "--keep-weight", type=float, default=1.0, metavar="WEIGHT", help="how much what is kept counts (1.0)"
    )
    parser.add_argument(
        "--ridge", type=float, default=0.03, metavar="RIDGE", help="how much a distance from the prior counts (0.03)"
    )
    parser.add_argument(
        "--prior-scale",
        type=float,
        default=0.0,
        metavar="SCALE",
        help="share of the difference that is taken where no examples say anything (0.0)",
    )
    parser.add_argument(
        "--positions",
        choices=("all", "answer"),
        default="all",
        help="which tokens count: all, or those of the answers only (all)",
    )
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help="only these modules (all)")
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="not these modules (none)")
    parser.add_argument(
        "--max-rank", type=int, default=128, metavar="RANK", help="up to which rank LoRA adapters can be made (128)"
    )
    add_examples(parser, samples=100, batch_size=4)
    add_output(parser, what="file of the fitted transfer")
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Fit and print what was written."""
    if len(arguments.dataset) != len(arguments.donor):
        arguments.refuse(
            f"argument --dataset: got {len(arguments.dataset)} for {len(arguments.donor)} donors, expected as many"
        )
    check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing():
        from act_peft import fit
        from act_peft.processes import process_index

    arguments.device = device_of(arguments)
    join_processes()
    reader = ExampleReader(arguments)
    names = [*arguments.dataset, *(arguments.keep_dataset or [])]
    examples = [reader.load(name) for name in names]
    base = reader.model(arguments.base)
    check_modules(base, target_modules=arguments.target_modules, exclude_modules=arguments.exclude_modules)
    donors = [reader.donor(name) for name in arguments.donor]
    data: list[Any] = [reader.own_batches(found, base, name=name) for name, found in zip(names, examples, strict=True)]
    fitted = fit(
        base,
        donors,
        data[: len(donors)],
        [batch for batches in data[len(donors) :] for batch in batches] if arguments.keep_dataset else None,
        keep_weight=arguments.keep_weight,
        ridge=arguments.ridge,
        prior_scale=arguments.prior_scale,
        positions=arguments.positions,
        target_modules=arguments.target_modules,
        exclude_modules=arguments.exclude_modules,
        max_rank=arguments.max_rank,
    )
    if process_index():  # all processes have the same fit
        return
    with output_file(arguments.output, overwrite=arguments.overwrite) as path:
        fitted.save(path)
    *ability, keep = fitted.record.num_tokens
    size = arguments.output.stat().st_size
    print(
        f"{arguments.output}: fitted transfer of {len(fitted.modules)} modules, {' + '.join(map(str, ability))} "
        f"tokens of the ability, {keep} to keep, {size / 1e6:.1f} MB"
    )
