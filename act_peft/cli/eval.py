"""`act-peft eval`: did it work?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from act_peft.cli.examples import ExampleReader, add_examples, device_of
from act_peft.cli.files import add_output, check_output_file, output_file
from act_peft.cli.imports import importing

SUMMARY = "Measure a base, adapters and other models on held-out examples, side by side."
EXAMPLE = "act-peft eval --base org/base --adapter ability --dataset ability-test.jsonl kept-test.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--base", required=True, help="model that the others are compared with: folder or Hub id; its tokenizer reads"
    )
    parser.add_argument(
        "--adapter", action="append", metavar="DIR", help="adapter of the base; may be repeated (none)"
    )
    parser.add_argument("--model", action="append", metavar="NAME", help="another model; may be repeated (none)")
    parser.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        help="held-out examples in one of TRL's formats, one for each skill: JSON(L) files, folders or Hub ids",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_examples(parser, samples=300, batch_size=8)
    add_output(parser, what="JSON file of all numbers", required=False)
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print the table."""
    for option in ("dataset", "adapter", "model"):
        names = getattr(arguments, option) or []
        if len(set(names)) < len(names):
            arguments.refuse(f"argument --{option}: got {', '.join(names)}, expected each once")
    if arguments.output is not None:
        check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing():
        from act_peft import evaluate
        from act_peft.data.models import load_adapter
        from act_peft.evaluation import Evaluation

    arguments.device = device_of(arguments)
    reader = ExampleReader(arguments)
    examples = {_short(name): reader.load(name) for name in arguments.dataset}
    if len(examples) < len(arguments.dataset):
        arguments.refuse("argument --dataset: got two files of one name, expected different names")
    base = reader.model(arguments.base)
    skills = {name: reader.measured(found, base, name=name) for name, found in examples.items()}
    results: dict[str, Any] = {}

    def measure(name: str, model: Any) -> None:
        results[name] = evaluate({name: model}, skills).results[name]

    measure(arguments.base, base)
    for adapter in arguments.adapter or []:
        model = load_adapter(base, adapter)
        measure(adapter, model)
        base = model.unload()
    del base
    for name in arguments.model or []:
        measure(name, reader.model(name))
    evaluation = Evaluation(results)
    text = json.dumps(evaluation.to_dict(), indent=1)
    if arguments.output is not None:
        with output_file(arguments.output, overwrite=arguments.overwrite) as path:
            path.write_text(f"{text}\n", encoding="utf-8")
    print(text if arguments.json else evaluation)


def _short(name: str) -> str:
    return Path(name).stem if Path(name).is_file() else name
