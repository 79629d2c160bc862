"""A recipe from a file: a YAML file, or the model card of an adapter that a recipe made."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from act_peft.errors import ActValueError
from act_peft.recipes.schema import Ability, Examples, Recipe

_LARGEST = 1 << 20  # bytes
_CARD = "README.md"
_IN_CARD = re.compile(r"^<!-- act_peft recipe -->\n```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe. Nothing that it names is opened.

    Folders and files in it are relative to the folder of the recipe.

    Args:
        path: a YAML file; the card (`README.md`) of an adapter that a recipe made, or its folder.

    Raises:
        ActValueError: no such file, damaged YAML, unknown or missing settings, values outside their ranges.

    Example:
        >>> read_recipe("recover.yaml").method
        'fit'
    """
    path = Path(path)
    if path.is_dir():
        path = path / _CARD
    if not path.is_file():
        raise ActValueError(f"{path}: there is no such file, expected a recipe (`act-peft recipes` lists some)")
    if path.stat().st_size > _LARGEST:
        raise ActValueError(f"{path}: is larger than {_LARGEST} bytes, expected a recipe")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ActValueError(f"{path}: is no UTF-8 text, expected a recipe in YAML") from error
    if path.suffix == ".md":
        found = _IN_CARD.search(text)
        if found is None:
            raise ActValueError(f"{path}: holds no recipe, expected the card of an adapter that a recipe made")
        text = found[1]
    return _located(_checked(_parsed(text, path), path), path.parent)


def card_section(recipe: Recipe) -> str:
    """The recipe as a part of a model card, which `read_recipe` finds."""
    plain = recipe.model_dump(mode="json", exclude_none=True)  # with today's defaults
    others = {"fit", "localize", "lora"} - {recipe.method} | ({"select"} if recipe.method == "lora" else set())
    for part in ("output", *others):
        plain.pop(part)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return f"<!-- act_peft recipe -->\n```yaml\n{text}```\n"


class _Loader(yaml.SafeLoader):
    """Plain values alone, every key once, nothing that refers to another part of the file."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not allowed here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found = super().construct_mapping(node, deep=True)
        if len(found) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = sorted({str(name) for name in names if names.count(name) > 1})
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is there more than once")
        return found


def _parsed(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ActValueError(f"{path}: cannot be read as YAML ({reason})") from error


def _checked(values: Any, path: Path) -> Recipe:
    if not isinstance(values, dict):
        raise ActValueError(f"{path}: got {type(values).__name__}, expected settings such as `base: org/model`")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_problem(found) for found in error.errors()[:5])
        raise ActValueError(f"{path}: {problems}") from error


def _problem(found: Any) -> str:
    """What is wrong with one value, in a few words."""
    where = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        known = _fields(found["loc"][:-1])
        near = difflib.get_close_matches(str(found["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"{where}: unknown setting ({hint})"
    if found["type"] == "missing":
        return f"{where} is missing"
    message = found["msg"].removeprefix("Value error, ")
    if not where or (found["type"] == "value_error" and isinstance(found["input"], dict)):
        return f"{where}: {message}" if where else message
    return f"{where}: got {found['input']!r:.80}, {message[0].lower()}{message[1:]}"


def _fields(location: tuple[Any, ...]) -> list[str]:
    """The settings that are known at a place of a recipe."""
    model: Any = Recipe
    for part in location:
        if part in ("abilities", "keep", "untouched") and model is Recipe:
            model = Ability if part == "abilities" else Examples
        elif model in (Ability, Examples):
            break
        else:
            field = model.model_fields.get(part)
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
            model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return list(model.model_fields)


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths for what lies beside it."""

    def place(name: str | None) -> str | None:
        beside = None if name is None else folder / name
        return name if beside is None or not beside.exists() else os.path.abspath(beside)

    def places(part: Examples) -> Examples:
        return part.model_copy(update={key: place(value) for key, value in part.model_dump().items()})

    update: dict[str, Any] = {"base": place(recipe.base), "donor": place(recipe.donor)}
    for group in ("abilities", "keep", "untouched"):
        update[group] = {name: places(part) for name, part in getattr(recipe, group).items()}
    if recipe.output.folder is not None:
        there = os.path.abspath(folder / recipe.output.folder)
        update["output"] = recipe.output.model_copy(update={"folder": there})
    return recipe.model_copy(update=update)
