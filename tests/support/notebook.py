"""Run a notebook without Jupyter: the cells one after the other, and their outputs.

python -m tests.support.notebook examples/analysis.ipynb       runs it and writes its outputs anew
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from act_peft.plots.files import picture


def run_notebook(path: Path) -> dict[str, Any]:
    """The notebook with the outputs that its code cells have now; what the last line of a cell gives is shown."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell["execution_count"], cell["outputs"] = number, _outputs("".join(cell["source"]), names, number)
    return notebook


def _outputs(code: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree, printed, shown = ast.parse(code), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if shown is not None:
        data: dict[str, Any] = {"text/plain": repr(shown).splitlines(keepends=True)}
        if type(shown).__name__ == "Figure":
            data["image/png"] = base64.b64encode(picture(shown, ".png", dots_per_inch=72)).decode()
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
    return outputs


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(json.dumps(run_notebook(place), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
