"""Arguments and checks that several commands share: selection, outputs."""

from __future__ import annotations

import argparse
from pathlib import Path

from act_peft.errors import ActValueError

SCOPE = "global: rank the channels of all modules together; module: the same share of every module (global)"
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
