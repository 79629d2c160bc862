"""HTML from Python: everything that is not markup already is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EMPTY = ("img", "meta")


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, *children: str, **attributes: str | int | None) -> Markup:
    """An element. Children are escaped unless they are `Markup`; attributes always are.

    Args:
        tag: its name.
        children: its content.
        attributes: an underscore at the end of a name falls away, others become hyphens; None leaves one out.
    """
    found = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY:
        return Markup(f"<{tag}{found}>")
    return Markup(f"<{tag}{found}>{joined(*children)}</{tag}>")


def joined(*parts: str) -> Markup:
    """Parts one after the other, each escaped unless it is `Markup`."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table in a region that can be scrolled with the keyboard; the first cell of a row is its name."""
    head_row = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    found = element("table", element("caption", caption), element("thead", head_row), element("tbody", joined(*body)))
    return element("div", found, class_="scroll", tabindex=0, role="region", aria_label=caption)


def facts(given: Sequence[tuple[str, str]]) -> Markup:
    """Names with their values."""
    return element("dl", *(joined(element("dt", name), element("dd", value)) for name, value in given))


def details(summary: str, *children: str) -> Markup:
    """Something that is shown on demand."""
    return element("details", element("summary", summary), *children)


def figure(drawn: Figure) -> Markup:
    """A figure as a picture inside the page, with a text for those who cannot see it."""
    from act_peft.plots import alt_text
    from act_peft.plots.files import picture

    data = base64.b64encode(picture(drawn, ".svg")).decode()
    width, height = (round(float(96 * inches)) for inches in drawn.get_size_inches())
    image = element("img", src=f"data:image/svg+xml;base64,{data}", alt=alt_text(drawn), width=width, height=height)
    return element("figure", image)
