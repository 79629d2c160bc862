"""Figures as files, and as text for those who cannot see them."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_peft.disk.atomic import write_file
from act_peft.errors import ActError, ActValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_DATES = {".svg": "Date", ".pdf": "CreationDate"}  # left out, so that equal figures give equal bytes


def check_matplotlib() -> None:
    """Check that figures can be drawn; to be called before long work that ends with one.

    Raises:
        ActError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ActError('figures: matplotlib is not installed, expected it (pip install "act-peft[plots]")')


def check_figure_file(path: str | os.PathLike[str]) -> None:
    """Check that a figure can be drawn and written there.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: a name that does not end in one of `FORMATS`, or a folder that does not exist.
    """
    check_matplotlib()
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ActValueError(f"{path}: got a name that ends in {path.suffix!r}, expected {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ActValueError(f"{path}: folder {path.parent} does not exist, expected an existing one (create it first)")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, SVG or PDF, whole or not at all.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: as `check_figure_file`.
    """
    check_figure_file(path)
    write_file(path, picture(figure, Path(path).suffix.lower()))


def picture(figure: Figure, suffix: str, *, dots_per_inch: int | None = None) -> bytes:
    """The bytes of a figure as a file with this suffix; equal figures give equal bytes.

    Args:
        figure: the figure.
        suffix: one of `FORMATS`.
        dots_per_inch: by default the figure's own.
    """
    from matplotlib import rc_context

    written = io.BytesIO()
    metadata = {_DATES[suffix]: None} if suffix in _DATES else None
    with rc_context({"svg.hashsalt": "act_peft"}):
        figure.savefig(written, format=suffix[1:], facecolor="white", metadata=metadata, dpi=dots_per_inch or "figure")
    return written.getvalue()


def alt_text(figure: Figure) -> str:
    """What a figure shows, in words: its title, what is on its axes, its caption."""
    axes = [(a.get_title(loc="left"), a.get_xlabel(), a.get_ylabel()) for a in figure.axes]
    described = [f"{title + ': ' if title else ''}{y or 'values'} against {x}" for title, x, y in axes if x]
    parts = [_text(figure._suptitle), *described, _text(figure._supxlabel)]  # type: ignore[attr-defined]
    return ". ".join(" ".join(part.split()) for part in parts if part)


def _text(found: Any) -> str:
    return "" if found is None else str(found.get_text())
