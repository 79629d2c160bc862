"""The sections of a report: one for each file, and one for what several files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from act_peft import plots
from act_peft.analysis.agreement import measure_agreement
from act_peft.analysis.composition import measure_composition
from act_peft.analysis.concentration import measure_concentration
from act_peft.analysis.disentanglement import Disentanglement, measure_disentanglement
from act_peft.analysis.overlap import compare_masks
from act_peft.analysis.stability import measure_stability, predict_overlap
from act_peft.analysis.tables import Table, percent
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Scope
from act_peft.errors import ActError
from act_peft.report.contents import Content, short_names
from act_peft.report.markup import Markup, details, element, facts, figure, joined, table

_FACTORS = (0.5, 1, 2, 4)
_PAIRS = 12  # masks whose pairs are tested one by one


def section(content: Content, number: int, *, density: float, scope: Scope) -> Markup:
    """The section of one file."""
    parts: list[Markup] = []
    if content.scores is not None:
        parts += _of_scores(content.scores, density, scope)
    if content.mask is not None:
        parts += _of_mask(content.mask)
    if content.scales:
        parts.append(figure(plots.draw_scales(content.scales)))
    if content.sweep is not None:
        lines = str(content.sweep)
        scrolled = element(
            "div", element("pre", lines), class_="scroll", tabindex=0, role="region", aria_label="Sweep"
        )
        parts += [figure(plots.draw_sweep(content.sweep)), details("Table of all settings", scrolled)]
    if content.patching is not None:
        parts += [figure(plots.draw_sufficiency(content.patching)), _table_of(content.patching)]
    return element(
        "section",
        element("h2", f"{content.kind.capitalize()}: {content.path}", id=f"file-{number}"),
        facts(list(content.facts.items())) if content.facts else Markup(""),
        *parts,
        aria_labelledby=f"file-{number}",
    )


def comparisons(contents: Sequence[Content], *, density: float, scope: Scope) -> Markup | None:
    """The section about what several scores and masks share; None if there is nothing to compare."""
    named = list(zip(short_names([content.path for content in contents]), contents, strict=True))
    scores = {name: content.scores for name, content in named if content.scores is not None}
    masks = {name: content.mask for name, content in named if content.mask is not None}
    parts: list[Markup] = []
    if len(scores) > 1:
        parts.append(_tried("scores", lambda: _of_several_scores(scores, density, scope)))
    if len(masks) > 1:
        parts.append(_tried("masks", lambda: _of_several_masks(masks)))
    if not parts:
        return None
    heading = element("h2", "What the files share", id="shared")
    return element("section", heading, *parts, aria_labelledby="shared")


def _of_scores(scores: ChannelScores, density: float, scope: Scope) -> list[Markup]:
    found = measure_concentration(scores)
    parts = [
        figure(plots.draw_distribution(scores, density=density, scope=scope)),
        figure(plots.draw_concentration(scores, density=density, scope=scope)),
    ]
    if scores.standard_errors is not None:
        curve = predict_overlap(scores, density=density, scope=scope, factors=_FACTORS, draws=1)
        parts.append(figure(plots.draw_sample_curve({"second run": curve})))
    return [*parts, details("Concentration by kind of module and by layer", _table_of(found))]


def _of_mask(mask: ChannelMask) -> list[Markup]:
    found = measure_composition(mask)
    warning = [] if found.warning is None else [element("p", f"Warning: {found.warning}", class_="warning")]
    return [
        *warning,
        figure(plots.draw_composition(found)),
        details("Channels by kind and by layer", _table_of(found)),
    ]


def _of_several_scores(scores: dict[str, ChannelScores], density: float, scope: Scope) -> Markup:
    note = f"density {percent(density)}, scope {scope.value}"
    if len({found.kind for found in scores.values()}) > 1:
        agreement = measure_agreement(scores, density=density, scope=scope)
        drawn = figure(plots.draw_overlaps(agreement.masks, title=agreement.title, note=note))
        return joined(element("h3", "Scores of different kinds"), drawn, _table_of(agreement))
    stability = measure_stability(scores, density=density, scope=scope)
    drawn = figure(plots.draw_overlaps(stability.masks, title=stability.title, note=note))
    return joined(element("h3", "Scores of one kind"), drawn, details("Table", _table_of(stability)))


def _of_several_masks(masks: dict[str, ChannelMask]) -> Markup:
    found: Disentanglement = measure_disentanglement(masks)
    parts = [element("h3", "Masks"), figure(plots.draw_overlaps(found)), details("Table", _table_of(found))]
    if len(masks) <= _PAIRS:
        names = list(masks)
        pairs = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
        tested = [(a, b, compare_masks(masks[a], masks[b])) for a, b in pairs]
        head = ["masks", *tested[0][2].texts()[0]]
        rows = [[f"{a} and {b}", *overlap.texts()[1]] for a, b, overlap in tested]
        parts.append(table("Pairs of masks, with permutations within modules", head, rows))
    return joined(*parts)


def _tried(what: str, make: Callable[[], Markup]) -> Markup:
    """A comparison, or why there is none: files of different models may stand in one report."""
    try:
        return make()
    except ActError as error:
        return element("p", f"The {what} are not compared: {error}", class_="warning")


def _table_of(found: Table) -> Markup:
    head, *rows = found.texts()
    return table(f"{found.title[0].upper()}{found.title[1:]}", head, rows)
