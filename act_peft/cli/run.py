"""`act-peft run`: a whole recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from act_peft.cli.imports import importing

SUMMARY = "Do what a recipe says: fit or localize, select, transfer, fine-tune, measure, merge, export."
EXAMPLE = "act-peft run recover.yaml --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "recipe",
        type=Path,
        help="a recipe (`act-peft recipes` lists some), or the folder of an adapter whose card has one",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of everything (output.folder)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe, say what it would do and need, and end"
    )
    parser.add_argument("--overwrite", action="store_true", help="do every step again, also those that are done")


def run(arguments: argparse.Namespace) -> None:
    """Run the recipe and print what came of it."""
    with importing():
        from act_peft.errors import ActValueError
        from act_peft.recipes.plan import plan_lines
        from act_peft.recipes.reading import read_recipe
        from act_peft.recipes.run import run_recipe

    recipe = read_recipe(arguments.recipe)
    output = arguments.output or recipe.output.folder
    if output is None:
        raise ActValueError(f"{arguments.recipe}: output.folder is missing, expected a folder (or name --output)")
    if arguments.dry_run:
        print("\n".join(plan_lines(recipe, Path(output))))
        return

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result = run_recipe(recipe, output=output, report=report, overwrite=arguments.overwrite)
    print(result.evaluation)
    print()
    for what, path in result.paths.items():
        print(f"{what:<10}  {path}")
