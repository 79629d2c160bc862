"""Text from strangers as it may be shown: on a terminal, in a log or an error, in a model card.

Names, paths and descriptions in files can hold anything: sequences that a terminal obeys, characters that turn the
direction of writing, lines that look like ours, HTML. Whatever shows such text takes it through one of these.
"""

from __future__ import annotations

import html
import re

_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+ *")
_MODEL = re.compile(r"[\w./\\:~+@ ,=()-]{1,300}")
_MARKDOWN = re.compile(r"([\\`*\[\]|~#!])")


def one_line(text: object) -> str:
    """Text in one line: spaces for line breaks, and every other character that is not printable as its code."""
    return without_controls(_BREAKS.sub(" ", str(text)))


def without_controls(text: str, *, keep: str = "") -> str:
    r"""Text with the code of every character that is not printable in its place, as `\x1b`.

    Args:
        text: any text.
        keep: characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def in_markdown(text: object) -> str:
    """Text in one line that Markdown shows as it is: no table, heading, link or HTML of its own."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(text), quote=False))


def model_name(text: object) -> str | None:
    """The name or folder of a model as it may stand in code and in metadata; None for what can be neither."""
    return text if isinstance(text, str) and text.isprintable() and _MODEL.fullmatch(text) else None
