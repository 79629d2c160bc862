"""`act-peft diff`: what differs between two checkpoints."""

from __future__ import annotations

import argparse
import json

from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

SUMMARY = "Compare two checkpoints from their files alone: what changed, by how much, and are they relatives?"
EXAMPLE = "act-peft diff org/base org/donor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("base", help="folder or Hub id of a checkpoint")
    parser.add_argument("donor", help="folder or Hub id of the other one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Compare and print the table.

    Raises:
        ActValueError: one of them is an adapter.
    """
    with importing():
        from act_peft.analysis import compare_checkpoints
        from act_peft.transfer.donors import is_adapter

    for name in (arguments.base, arguments.donor):
        if is_adapter(name):
            raise ActValueError(f"{name}: got an adapter, expected a checkpoint (see act-peft inspect, or merge it)")
    found = compare_checkpoints(arguments.base, arguments.donor)
    if not arguments.json:
        print(found)
        return
    settings = {name: {"base": mine, "donor": theirs} for name, (mine, theirs) in found.settings.items()}
    text = {
        "verdict": found.verdict,
        "cosine": found.matrices.cosine,
        "settings": settings,
        "tied": found.tied,
        "tokens": found.tokens,
        "only_base": found.only_base,
        "only_donor": found.only_donor,
        "parameters": found.records(),
    }
    print(json.dumps(text, indent=2))
