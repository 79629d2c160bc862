"""Tables in text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from act_peft.plain import one_line


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table: every column as wide as its widest cell, two spaces apart.

    Args:
        rows: the cells of every line, as many in each; what is not printable is shown as its code.
        left: numbers of the columns that are aligned to the left; the others are aligned to the right.
    """
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
