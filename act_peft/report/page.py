"""The page: one file without scripts and without a network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from act_peft import __version__
from act_peft.channels.selection import Scope
from act_peft.checks import finite_number, member_of
from act_peft.disk.atomic import write_file
from act_peft.errors import ActValueError
from act_peft.plots.files import check_matplotlib
from act_peft.report.contents import Content, read_content
from act_peft.report.markup import Markup, element, facts, joined
from act_peft.report.sections import comparisons, section

# Nothing is loaded from anywhere, no script runs, whatever the files hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --paper: #ffffff; --faint: #e3e6ea; --link: #1f5fa8;
  --warn: #fff3d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16191d; --faint: #3a4048; --link: #8bbdf5; --warn: #4a3a10 }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem 1.25rem 4rem; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25 }
h2 { border-top: 1px solid var(--faint); padding-top: 1.2rem; margin-top: 2.2rem }
a { color: var(--link) }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.skip { position: absolute; left: -100rem } .skip:focus { position: static }
figure { margin: 1.2rem 0; background: #ffffff; border: 1px solid var(--faint); border-radius: 6px; padding: .5rem }
img { max-width: 100%; height: auto; display: block }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1rem } dd { margin: 0 }
dt { opacity: .75 }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap }
th[scope=row], th:first-child { text-align: left }
pre { font-size: .8rem } summary { cursor: pointer; font-weight: 600; margin: .6rem 0 }
.warning { background: var(--warn); padding: .6rem .9rem; border-radius: 6px }
@media print { details > * { display: block } }
"""


def write_report(
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    title: str = "Where an ability sits",
    density: float = 0.05,
    scope: str | Scope = Scope.MODULE,
) -> None:
    """Write one HTML page about some files: what they hold, where it comes from, pictures and tables.

    Files of scores, masks, fitted transfers, folders of adapters, and the JSON of sweeps and patching. Several scores
    or masks of one model are compared. The page needs no network and runs no script.

    Args:
        files: the files, at least one.
        output: the page to write, whole or not at all.
        title: its title.
        density: share of the channels that is selected from scores, above 0 and at most 1.
        scope: as in `ChannelScores.top`.

    Raises:
        ActError: matplotlib is not installed.
        ActTypeError, ActValueError: no file, a file that cannot be read, an unknown setting, a folder that does not
            exist.

    Example:
        >>> from act_peft.report import write_report
        >>> scores.save("scores.safetensors")
        >>> mask.save("mask.safetensors")
        >>> write_report(["scores.safetensors", "mask.safetensors"], "report.html")
    """
    check_matplotlib()
    output = Path(output)
    density, scope = finite_number(density, "density", above=0, most=1), member_of(Scope, scope, "scope")
    if not files:
        raise ActValueError("files: got none, expected at least one")
    if not output.parent.is_dir():
        raise ActValueError(
            f"{output}: folder {output.parent} does not exist, expected an existing one (create it first)"
        )
    contents = [read_content(path) for path in files]
    write_file(output, _page(contents, title, density=density, scope=scope).encode())


def _page(contents: Sequence[Content], title: str, *, density: float, scope: Scope) -> str:
    shared = comparisons(contents, density=density, scope=scope)
    links = [element("li", element("a", f"{c.kind}: {c.path}", href=f"#file-{n}")) for n, c in enumerate(contents)]
    if shared is not None:
        links.append(element("li", element("a", "What the files share", href="#shared")))
    sections = [section(content, number, density=density, scope=scope) for number, content in enumerate(contents)]
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), element("nav", element("ul", *links), aria_label="Contents")),
        element("main", *sections, shared or Markup(""), _provenance(), id="content"),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _provenance() -> Markup:
    packages = {"act_peft": __version__, "Python": platform.python_version()}
    packages |= {name: importlib.metadata.version(name) for name in ("torch", "matplotlib")}
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    known = [("made", made), *((f"version of {name}", version) for name, version in packages.items())]
    heading = element("h2", "How this page was made", id="made")
    return element("section", joined(heading, facts(known)), aria_labelledby="made")
