"""The recipes that come with the package, and what they are tried on: the demo's models and examples."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from act_peft.disk.atomic import new_folder
from act_peft.disk.folders import FolderKind, check_output
from act_peft.errors import ActValueError

_EXAMPLES, _TEST_EXAMPLES = 300, 300
_PACKAGE = Path(__file__).parent.parent
# In an installed package, and in the repository.
_PLACES = (_PACKAGE / "ready_recipes", _PACKAGE.parent / "examples" / "recipes")


def ready_recipes() -> dict[str, str]:
    """Name of every recipe -> the first line of its file."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in _files()}


def copy_recipe(name: str, output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Copy a recipe, with the two tiny models and the examples that it names, into a folder.

    Args:
        name: one of `ready_recipes()`.
        output: the folder; it appears whole or not at all.
        overwrite: whether an older folder is replaced.

    Returns:
        The recipe's path.

    Raises:
        ActValueError: no such recipe; a folder that exists, or with `overwrite` one of something else.
    """
    found = {path.stem: path for path in _files()}
    if name not in found:
        raise ActValueError(f"recipe: got {name!r}, expected one of {', '.join(found)}")
    output, kind = Path(output), FolderKind("a recipe", frozenset(f"{known}.yaml" for known in found))
    check_output(output, [], overwrite=overwrite, kind=kind)
    with new_folder(output, overwrite=overwrite, kind=kind) as folder:
        shutil.copyfile(found[name], folder / found[name].name)
        for model in (BASE, DONOR):
            shutil.copytree(model, folder / model.name, copy_function=shutil.copyfile)
        for language in Language:
            for split, count in ((Split.TRAIN, _EXAMPLES), (Split.TEST, _TEST_EXAMPLES)):
                lines = (json.dumps(row) for row in rows(language, split, count=count))
                path = folder / f"{language.name.lower()}-{split.name.lower()}.jsonl"
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return output / found[name].name


def _files() -> list[Path]:
    return sorted(next(place for place in _PLACES if place.is_dir()).glob("*.yaml"))
