"""`act-peft recipes`: the recipes and scripts that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from act_peft.cli.files import add_output
from act_peft.cli.imports import importing

SUMMARY = "List the recipes that come with the package, or copy one, with tiny models and examples to try it on."
EXAMPLE = "act-peft recipes recover --output try"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("recipe", nargs="?", help="name of a recipe (lists them)")
    add_output(parser, what="folder for the recipe, two tiny models and examples", required=False)
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """List the recipes, or copy one."""
    if arguments.recipe is None and arguments.output is not None:
        arguments.refuse("argument --output: expected together with the name of a recipe")
    with importing():
        from act_peft.demo.recipes import copy_recipe, ready_recipes

    if arguments.recipe is None:
        for name, summary in ready_recipes().items():
            print(f"{name:<12}  {summary}")
        print("copy one with: act-peft recipes NAME --output FOLDER")
        return
    output = Path(arguments.recipe) if arguments.output is None else arguments.output
    path = copy_recipe(arguments.recipe, output, overwrite=arguments.overwrite)
    print(f"{path}: for the tiny models beside it; name your own models and examples in it\nnext:")
    print(f"  act-peft run {path}")
