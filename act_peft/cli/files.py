"""Arguments and checks that several commands share: selection, outputs, datasets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

SCOPE = "global: rank the channels of all modules together; module: the same share of every module (global)"
TARGETS = ("peft", "vllm", "sglang", "llama.cpp")  # act_peft.export.Target, without importing it
NORMALIZE = "rms: divide the scores of each module by their root mean square before ranking; none: do not (none)"


def add_output(parser: argparse.ArgumentParser, *, what: str, required: bool = True) -> None:
    """Add `--output` and `--overwrite`."""
    default = "" if required else " (none)"
    parser.add_argument("--output", type=Path, required=required, help=f"{what} to write{default}")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that cannot or must not be written.

    Raises:
        ActValueError: the file exists (without `overwrite`), is a folder or a device, or its folder does not exist.
    """
    if path.is_dir():
        raise ActValueError(f"{path}: got a folder, expected the name of a file to write")
    if path.exists() and not path.is_file():
        raise ActValueError(f"{path}: got no regular file, expected the name of a file to write (name a new one)")
    if path.exists() and not overwrite:
        raise ActValueError(f"{path}: exists, expected a new file (name another --output, or add --overwrite)")
    if not path.parent.is_dir():
        raise ActValueError(f"{path}: folder {path.parent} does not exist, expected an existing one (create it first)")


@contextmanager
def output_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """The path of a file to write that becomes `path`; without `overwrite` it replaces nothing that has appeared."""
    with importing():
        from act_peft.disk.atomic import new_file

    with new_file(path, overwrite=overwrite) as beside:
        yield beside


def reason_of(error: BaseException) -> str:
    """What another library says of a failure, short, with the kind of error where that says more."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


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
    except Exception as error:  # damaged files fail anywhere inside datasets
        where = "cannot be loaded" if path.exists() else "there is no such file or folder, nor can it be loaded"
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # the message of the reader
        raise ActValueError(f"dataset {dataset!r}: {where}, {expected} ({reason_of(reason or error)})") from error
    if not len(examples):
        raise ActValueError(f"dataset {dataset!r}: got no examples, expected at least one (in split {split!r})")
    _check_columns(dataset, examples.column_names)
    if samples is None or samples >= len(examples):
        return examples
    return examples.shuffle(seed=seed).select(range(samples))


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
