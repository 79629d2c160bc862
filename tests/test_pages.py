"""The pages beside the code: their links lead somewhere, and the files and names in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "act_peft/README.md",
    "examples/README.md",
    "examples/evidence/README.md",
    "tests/README.md",
]
PLACES = ("act_peft", "tests", "examples", ".ci")
PATH = re.compile(r"\.?\w[\w./-]*(/|\.py|\.md|\.toml|\.txt|\.cff)|\.ci/\w+")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)}


def found(name: str, page: str) -> bool:
    """Whether a path exists beside the page, in the repository or in the package; a mere file name, anywhere there."""
    folders = [(ROOT / page).parent, ROOT, ROOT / "act_peft"]
    if any((folder / name).exists() for folder in folders):
        return True
    return "/" not in name and any(next((ROOT / place).rglob(name), None) for place in PLACES)


def test_every_page_is_known():
    pages = [*ROOT.glob("*.md"), *(path for place in PLACES for path in (ROOT / place).rglob("*.md"))]
    assert {path.relative_to(ROOT).as_posix() for path in pages} == set(PAGES), "add it to PAGES, and link to it"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text(page))
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, heading = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if heading:
            assert heading in anchors(path.resolve().relative_to(ROOT.resolve()).as_posix()), f"{page}: {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which tells of files that went
def test_paths_exist(page):
    for code in re.findall(r"`([^`\n]+)`", text(page)):
        for word in code.split():
            if PATH.fullmatch(word) and "://" not in word:
                assert found(word, page), f"{page}: {word}"
        for module in re.findall(r"python -m (tests\.[\w.]+)", code):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), f"{page}: {module}"


def test_names_are_in_the_files_that_the_map_says():
    pairs = re.findall(r"`([\w/]+\.py)`(?::| \() ?`?`([A-Za-z_][\w.]*)", text("act_peft/README.md"))
    assert len(pairs) > 15
    for file, name in pairs:
        code = (ROOT / "act_peft" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b|^\s*{part}\b.* = ", code, re.MULTILINE), f"{file}: {name}"


def test_every_package_is_on_the_map():
    page = text("act_peft/README.md")
    for path in (ROOT / "act_peft").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if path.is_dir() or path.suffix == ".py":
            assert f"`{name}`" in page or name in ("__pycache__/", "__main__.py"), name


def test_the_pages_are_in_the_source_package():
    included = re.search(r"sdist\]\ninclude = \[(.*?)\]", text("pyproject.toml"), re.DOTALL)[1]
    for page in [*PAGES, "CITATION.cff", ".ci/constraints.txt"]:
        assert f'"{page.partition("/")[0]}"' in included, page


def test_citation():
    """The file has what Citation File Format 1.2.0 asks for."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load(text("CITATION.cff"))
    for entry in (citation, citation["preferred-citation"]):
        assert entry["title"]
        assert entry["authors"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
