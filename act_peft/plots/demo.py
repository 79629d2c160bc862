"""The figure of the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Scope
from act_peft.plots.accuracies import Accuracies, check_skills, paint_accuracies
from act_peft.plots.concentration import paint_concentration
from act_peft.plots.style import data_of, finish, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_demo(
    scores: ChannelScores,
    accuracies: Accuracies,
    *,
    density: float,
    title: str,
    highlight: str,
    scope: str | Scope = Scope.GLOBAL,
    note: str = "",
) -> Figure:
    """Draw what `draw_concentration` and `draw_accuracies` draw, side by side.

    Args:
        scores: as in `draw_concentration`.
        accuracies: as in `draw_accuracies`.
        density: as in `draw_concentration`.
        title: the finding.
        highlight: the model that the finding is about.
        scope: as in `draw_concentration`.
        note: more for the caption, such as the seed.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: as in `draw_concentration` and `draw_accuracies`.
    """
    skills = check_skills(accuracies)
    figure = new_figure(13.5, 5.2)
    panels = figure.subplots(1, 1 + len(skills), width_ratios=[1.75, *[1] * len(skills)])
    found = paint_concentration(panels[0], scores, density, scope)
    panels[0].set_title("\n".join(wrapped(panels[0].figure, found, 3.4).split("\n")), loc="left", fontsize=10)
    for axes in panels[2:]:
        axes.sharey(panels[1])
    paint_accuracies(list(panels[1:]), accuracies, highlight)
    for axes in panels[2:]:
        axes.tick_params(labelleft=False)
    return finish(figure, title, [data_of(scores), note])
