"""Examples in TRL's formats, from files, folders and the Hub."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from act_peft.data.failures import reason_of
from act_peft.errors import ActValueError

_FILE_NAME = re.compile(r"[\w-]{1,60}")
_MOST_VALUES = 200  # of a column that divides a dataset; more are no domains or languages
_EXPECTED = "expected a JSON or JSONL file, a folder or a Hub id"


def load_examples(dataset: str, *, split: str = "train", samples: int | None = None, seed: int = 0) -> Dataset:
    """Load a dataset in one of TRL's formats.

    Args:
        dataset: a JSON or JSONL file, a folder, or an id on the Hub.
        split: split of the dataset.
        samples: number of examples, drawn at random; None takes all.
        seed: seed of the random draw.

    Raises:
        ActValueError: there is no such dataset or split; it is damaged or empty; it has none of TRL's formats.

    Example:
        >>> load_examples("ability.jsonl", samples=10).column_names
        ['prompt', 'completion']
    """
    path = Path(dataset)
    if not path.exists() and (path.suffix in (".json", ".jsonl") or path.is_absolute() or dataset[:1] in (".", "~")):
        raise ActValueError(f"dataset {dataset!r}: there is no such file or folder, {_EXPECTED} (check the path)")
    try:
        if path.is_file():
            examples = load_dataset("json", data_files=dataset, split=split)
        else:
            examples = load_dataset(dataset, split=split)
    except StopIteration:  # raised for an empty file
        examples = []
    except Exception as error:  # damaged files fail anywhere inside datasets
        where = "cannot be loaded" if path.exists() else "there is no such file or folder, nor can it be loaded"
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # the message of the reader
        raise ActValueError(f"dataset {dataset!r}: {where}, {_EXPECTED} ({reason_of(reason or error)})") from error
    if not len(examples):
        raise ActValueError(f"dataset {dataset!r}: got no examples, expected at least one (in split {split!r})")
    _check_columns(dataset, examples.column_names)
    return draw(examples, samples, seed)


def load_by_column(
    dataset: str, column: str, *, split: str = "train", samples: int | None = None, seed: int = 0
) -> dict[str, Dataset]:
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
    examples = load_examples(dataset, split=split)
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


def draw(examples: Dataset, samples: int | None, seed: int) -> Dataset:
    """Some examples, drawn at random; all of them in their order if there are no more."""
    if samples is None or samples >= len(examples):
        return examples
    return examples.shuffle(seed=seed).select(range(samples))


def _check_columns(dataset: str, columns: Sequence[str]) -> None:
    """Check that a dataset has the columns of a format that `SFTTrainer` reads.

    Raises:
        ActValueError: it has not.
    """
    needed = {"completion", "chosen"} if "prompt" in columns else {"text", "messages", "conversations"}
    if not (needed | {"input_ids"}).intersection(columns):
        raise ActValueError(
            f"dataset {dataset!r}: got the columns {columns}, expected those of one of TRL's formats: 'prompt' and "
            "'completion', 'messages', or 'text' (rename them)"
        )
