"""`act-peft plot`: one picture of a file, or of what several files share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from act_peft.cli.files import SCOPE_OF_MODULES, add_output, check_output_file, output_file
from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

SUMMARY = "Draw a picture of scores, masks, an adapter, a sweep or patching."
EXAMPLE = "act-peft plot scores.safetensors --output scores.png"
_WHAT = ("distribution", "concentration", "samples", "composition", "overlaps", "scales", "sweep", "sufficiency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="file of scores, a mask or a fitted transfer; folder of an adapter; JSON of a sweep or of patching; "
        "several scores or masks: what they share",
    )
    parser.add_argument(
        "--what",
        choices=_WHAT,
        help="distribution, concentration, samples (how many are enough) or composition of scores; composition of a "
        "mask or an adapter, or its learned scales (the first of these that the file has)",
    )
    parser.add_argument(
        "--density", type=float, default=0.05, help="share of the channels that is selected from scores (0.05)"
    )
    parser.add_argument("--scope", choices=("global", "module"), default="module", help=SCOPE_OF_MODULES)
    parser.add_argument("--note", default="", help="more for the caption, such as the data and the seed (nothing)")
    add_output(parser, what="PNG, SVG or PDF")


def run(arguments: argparse.Namespace) -> None:
    """Draw, and print the finding.

    Raises:
        ActValueError: the picture cannot be drawn of these files.
    """
    check_output_file(arguments.output, overwrite=arguments.overwrite)
    with importing(library=False):
        from act_peft.plots import check_figure_file, save_figure
        from act_peft.report.contents import read_content

    check_figure_file(arguments.output)
    contents = [read_content(path) for path in arguments.files]
    possible = _overlaps(contents, arguments) if len(contents) > 1 else _pictures(contents[0], arguments)
    what = arguments.what or next(iter(possible))
    if what not in possible:
        raise ActValueError(
            f"what: got {what!r}, expected one of {', '.join(possible)} for {arguments.files[0]}"
            f"{' and others' if len(contents) > 1 else ''}"
        )
    figure = possible[what]()
    with output_file(arguments.output, overwrite=arguments.overwrite) as path:
        save_figure(figure, path)
    print(f"{arguments.output}: {' '.join(figure._suptitle.get_text().split())}")


def _pictures(content: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What can be drawn of one file, the usual picture first."""
    from act_peft import plots
    from act_peft.analysis.composition import measure_composition
    from act_peft.analysis.stability import predict_overlap
    from act_peft.channels.selection import select_channels

    selection: Any = {"density": arguments.density, "scope": arguments.scope}
    drawing: Any = {"note": arguments.note}
    found: dict[str, Any] = {}
    scores = content.scores
    if scores is not None:

        def mask() -> Any:
            return select_channels(scores, scores.num_comparable, **selection, normalize="none")

        found["distribution"] = lambda: plots.draw_distribution(scores, **selection, **drawing)
        found["concentration"] = lambda: plots.draw_concentration(scores, **selection, **drawing)
        found["composition"] = lambda: plots.draw_composition(measure_composition(mask()), **drawing)
        found["samples"] = lambda: plots.draw_sample_curve(
            {"second run": predict_overlap(scores, **selection)}, **drawing
        )
    if content.mask is not None:
        found["composition"] = lambda: plots.draw_composition(measure_composition(content.mask), **drawing)
    if content.scales:
        found["scales"] = lambda: plots.draw_scales(content.scales, **drawing)
    if content.sweep is not None:
        found["sweep"] = lambda: plots.draw_sweep(content.sweep, **drawing)
    if content.patching is not None:
        found["sufficiency"] = lambda: plots.draw_sufficiency(content.patching, **drawing)
    return found


def _overlaps(contents: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The picture of what several files share.

    Raises:
        ActValueError: they are not all scores, or not all masks.
    """
    from act_peft import plots
    from act_peft.analysis.agreement import measure_agreement
    from act_peft.analysis.disentanglement import measure_disentanglement
    from act_peft.report.contents import short_names

    names = short_names([content.path for content in contents])
    if all(content.mask is not None for content in contents):
        masks = {name: content.mask for name, content in zip(names, contents, strict=True)}
        return {"overlaps": lambda: plots.draw_overlaps(measure_disentanglement(masks), note=arguments.note)}
    if all(content.scores is not None for content in contents):
        scores = {name: content.scores for name, content in zip(names, contents, strict=True)}

        def draw() -> Any:
            found = measure_agreement(scores, density=arguments.density, scope=arguments.scope)
            return plots.draw_overlaps(found.masks, title=found.title, note=arguments.note)

        return {"overlaps": draw}
    raise ActValueError("files: got several of different kinds, expected only scores, or only masks and adapters")
