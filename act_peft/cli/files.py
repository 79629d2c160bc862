"""Arguments and checks that several commands share: selection, outputs, datasets."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

_FILE_NAME = re.compile(r"[\w-]{1,60}")
_MOST_VALUES = 200  # of a column that divides a dataset; more are no domains or languages
SCOPE = "global: rank the channels of all modules together; module: the same share of every module (global)"
SCOPE_OF_MODULES = SCOPE.replace("(global)", "(module)")
NORMALIZE = "rms: divide the scores of each module by their root mean square before ranking; none: do not (none)"


def add_output(parser: argparse.ArgumentParser, *, what: str, required: bool = True) -> None:
    """Add `--output` and `--overwrite`."""
    default = "" if required else " (none)"
    parser.add_argument("--output", type=Path, required=required, help=f"{what} to write{default}")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that cannot or must not be written.

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
        split: split of the dataset.
        samples: number of examples, drawn at random; None takes all.
        seed: seed of the random draw.

    Raises:
        ActValueError: there is no such dataset or split; it is damaged or empty; it has none of TRL's formats.
    """
    with importing():
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError

    path = Path(dataset)
    expected = "expected a JSON or JSONL file, a folder or a Hub id"
    if not path.exists() and (path.suffix in (".json", ".jsonl") or path.is_absolute() or dataset[:1] in (".", "~")):
        raise ActValueError(f"dataset {dataset!r}: there is no such file or folder, {expected} (check the path)")
    try:
        if path.is_file():
            examples = load_dataset("json", data_files=dataset, split=split)
        else:
            examples = load_dataset(dataset, split=split)
    except StopIteration:  # raised for an empty file
        examples = []
    except (DatasetGenerationError, FileNotFoundError, TypeError, ValueError, ConnectionError) as error:
        where = "cannot be loaded" if path.exists() else "there is no such file or folder, nor can it be loaded"
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # the message of the reader
        raise ActValueError(f"dataset {dataset!r}: {where}, {expected} ({reason or error})") from error
    if not len(examples):
        raise ActValueError(f"dataset {dataset!r}: got no examples, expected at least one (in split {split!r})")
    _check_columns(dataset, examples.column_names)
    if samples is None or samples >= len(examples):
        return examples
    return examples.shuffle(seed=seed).select(range(samples))


def load_by_column(dataset: str, column: str, *, split: str, samples: int | None, seed: int) -> dict[str, Any]:
    """Load a dataset and divide it by the values of a column.

    Args:
        dataset: as in `load_examples`.
        column: name of the column; its values are texts, numbers or truth values.
        split: as in `load_examples`.
        samples: number of examples of each value.
        seed: as in `load_examples`.

    Returns:
        Value as text -> its examples, in the order of the first ones.

    Raises:
        ActValueError: as `load_examples`; there is no such column; its values are no names for files; there are too
            many of them.
    """
    examples = load_examples(dataset, split=split, samples=None, seed=seed)
    where = f"dataset {dataset!r}: column {column!r}"
    if column not in examples.column_names:
        raise ActValueError(f"{where}: there is none, expected one of {', '.join(examples.column_names)}")
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(examples[column]):
        text = str(value)
        if not isinstance(value, (str, int, bool)) or not _FILE_NAME.fullmatch(text):
            raise ActValueError(
                f"{where}: got {value!r:.80} in row {number}, expected values that can be part of the name of a file "
                "(letters, digits, '-', '_')"
            )
        rows.setdefault(text, []).append(number)
    if len(rows) > _MOST_VALUES:
        raise ActValueError(f"{where}: got {len(rows)} different values, expected at most {_MOST_VALUES}")
    generator = random.Random(seed)
    found = {}
    for value, numbers in rows.items():
        chosen = numbers if samples is None or len(numbers) <= samples else generator.sample(numbers, samples)
        found[value] = examples.select(chosen).remove_columns(column)
    return found


def _check_columns(dataset: str, columns: Sequence[str]) -> None:
    """Check that a dataset has the columns of a format that `SFTTrainer` reads.

    Raises:
        ActValueError: it has not.
    """
    needed = {"completion"} if "prompt" in columns else {"text", "messages", "conversations"}
    if not (needed | {"input_ids"}).intersection(columns):
        raise ActValueError(
            f"dataset {dataset!r}: got the columns {columns}, expected those of one of TRL's formats: 'prompt' and "
            "'completion', 'messages', or 'text' (rename them)"
        )
