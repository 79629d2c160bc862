"""What several commands share: outputs that must not be overwritten, masks from files, examples from datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from act_peft.errors import ActValueError


def add_output(parser: argparse.ArgumentParser, *, what: str) -> None:
    """Add `--output` and `--overwrite`."""
    parser.add_argument("--output", type=Path, required=True, help=f"{what} to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that could not be written or must not be.

    Raises:
        ActValueError: the file exists (without `overwrite`), is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise ActValueError(f"{path}: got a folder, expected the name of a file to write")
    if path.exists() and not overwrite:
        raise ActValueError(f"{path}: exists, expected a new file (name another --output, or add --overwrite)")
    if not path.parent.is_dir():
        raise ActValueError(f"{path}: folder {path.parent} does not exist, expected an existing one (create it first)")


def load_examples(dataset: str, *, split: str, samples: int | None, seed: int) -> Any:
    """Load a dataset in one of TRL's formats.

    Args:
        dataset: a JSON or JSONL file, a folder, or an id on the Hub.
        split: its split.
        samples: how many examples, drawn at random; None takes all.
        seed: of the drawing.

    Raises:
        ActValueError: there is no such dataset or split.
    """
    from datasets import load_dataset

    try:
        if Path(dataset).is_file():
            examples = load_dataset("json", data_files=dataset, split=split)
        else:
            examples = load_dataset(dataset, split=split)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ActValueError(
            f"dataset {dataset!r}: cannot be loaded, expected a JSON or JSONL file, a folder or a Hub id ({error})"
        ) from error
    if samples is None or samples >= len(examples):
        return examples
    return examples.shuffle(seed=seed).select(range(samples))
