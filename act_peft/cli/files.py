"""Arguments and checks that several commands share: selection, outputs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

SCOPE = "global: rank the channels of all modules together; module: the same share of every module (global)"
TARGETS = ("peft", "vllm", "sglang", "llama.cpp")  # act_peft.export.Target, without importing it
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
    with importing(library=False):
        from act_peft.disk.atomic import new_file

    with new_file(path, overwrite=overwrite) as beside:
        yield beside
