"""Small guards: imports point one way, `__all__` is what is exported, the version stands in one place."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import act_peft

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "act_peft"
# A package or file may import those before it, and what lies in its own package.
ORDER = [
    "interrupts",
    "plain",
    "errors",
    "patterns",
    "doors",
    "processes",
    "shards",
    "offloading",
    "peft_modules",
    "checks",
    "tables",
    "disk",
    "batches",
    "data",
    "channels",
    "adapter",
    "localization",
    "layers",
    "export",
    "transfer",
    "fitting",
    "combination",
    "training",
    "merging",
    "merge",
    "tuner",
    "sweeps",
    "evaluation",
    "analysis",
    "library",
    "plots",
    "report",
    "recipes",
    "demo",
    "cli",
]


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "act_peft":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("act_peft.")}
    return found


def test_imports_point_one_way():
    names = {
        path.stem if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")
    }
    assert names - {"__init__", "__main__"} == set(ORDER)
    for path in PACKAGE.rglob("*.py"):
        own = path.stem if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0]
        if own not in ORDER:
            continue
        allowed = {*ORDER[: ORDER.index(own) + 1], "__version__"}
        if own in ("demo", "cli"):
            allowed |= set(act_peft.__all__)  # these are users of the public interface
        assert imported_parts(path) <= allowed, path


def test_some_packages_know_nothing_of_peft():
    for package in ("disk", "batches", "channels"):
        for path in (PACKAGE / package).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) (peft|act_peft\.doors)\b", path.read_text(), re.MULTILINE), path


def test_no_exported_function_hides_a_module():
    for name in act_peft.__all__:
        assert importlib.util.find_spec(f"act_peft.{name}") is None, f"act_peft.{name} is also a module: rename it"


def test_what_is_exported_is_what_exists():

    for name in act_peft.__all__:
        assert getattr(act_peft, name) is not None
    public = {
        name
        for name, value in vars(act_peft).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("act_peft") and name != "register"
    }
    assert public == set(act_peft.__all__) - {"__version__"}


def test_the_version_stands_in_one_place():
    assert importlib.metadata.version("act-peft") == act_peft.__version__
    pattern = re.compile(rf"\b{re.escape(act_peft.__version__)}\b")
    places = [p for p in [ROOT / "pyproject.toml", *PACKAGE.rglob("*.py")] if pattern.search(p.read_text())]
    assert places == [PACKAGE / "__init__.py"]


def test_the_changelog_knows_the_version():
    assert f"## [{act_peft.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
