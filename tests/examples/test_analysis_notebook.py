"""The notebook runs, and its text says what its cells show."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from tests.support.notebook import run_notebook

NOTEBOOK = Path(__file__).parents[2] / "examples" / "analysis.ipynb"


def texts(notebook):
    """What the cells print or give, without numbers after the second digit: machines round differently."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            lines = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
            found.append("".join(lines))
    return found


def test_it_is_shipped_with_its_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code[1:])
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"]) == 7
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.slow
def test_it_runs_and_gives_what_it_shows():
    with warnings.catch_warnings():
        found = run_notebook(NOTEBOOK)
    shown = texts(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    for mine, theirs in zip(texts(found), shown, strict=True):
        assert re.sub(r"[\d.,]+", "#", mine).split() == re.sub(r"[\d.,]+", "#", theirs).split()
        numbers = [[float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", text)] for text in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.02)
