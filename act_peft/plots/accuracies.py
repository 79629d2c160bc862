"""What several models can do, as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from act_peft.errors import ActValueError
from act_peft.plots.style import COLOURS, GREY, INK, as_percent, finish, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Accuracies = Mapping[str, Mapping[str, float]]


def draw_accuracies(accuracies: Accuracies, *, title: str, highlight: str | None = None, note: str = "") -> Figure:
    """Draw accuracies as bars, one panel a skill and one bar a model.

    Args:
        accuracies: model -> skill -> share from 0 to 1; the same skills for every model. Bars of models whose name
            begins with "control" are hatched.
        title: the finding.
        highlight: the model that the finding is about.
        note: the caption, such as the number of problems and the seed.

    Raises:
        ActError: matplotlib is not installed.
        ActValueError: the models have different skills or none.
    """
    skills = check_skills(accuracies)
    figure = new_figure(2.4 * len(skills) + 2.2, 0.36 * len(accuracies) + 1.9)
    paint_accuracies(list(figure.subplots(1, len(skills), sharey=True, squeeze=False)[0]), accuracies, highlight)
    return finish(figure, title, [note])


def check_skills(accuracies: Accuracies) -> list[str]:
    """The skills.

    Raises:
        ActValueError: the models have different skills or none.
    """
    skills = list(next(iter(accuracies.values()), ()))
    different = [name for name, row in accuracies.items() if list(row) != skills]
    if not skills or different:
        where = different[0] if different else "accuracies"
        raise ActValueError(
            f"{where}: got {list(accuracies.get(where, ()))}, expected the same skills for every model"
        )
    return skills


def paint_accuracies(panels: Sequence[Axes], accuracies: Accuracies, highlight: str | None) -> None:
    """Draw into existing axes, one for each skill."""
    names = list(accuracies)
    for axes, skill in zip(panels, check_skills(accuracies), strict=True):
        for place, name in enumerate(names):
            value = accuracies[name][skill]
            axes.barh(place, value, height=0.68, **_bar(name, highlight))
            axes.annotate(
                f"{100 * value:.0f}",
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
                fontweight="bold" if name == highlight else "normal",
            )
        axes.set_title(skill, loc="left", fontsize=10, color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.5, 1])
        axes.xaxis.set_major_formatter(as_percent)
        axes.set_xlabel("answered right")
        plain_axes(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == highlight else "normal")


def _bar(name: str, highlight: str | None) -> dict[str, Any]:
    if name == highlight:
        return {"color": COLOURS[0]}
    if name.startswith("control"):
        return {"color": "white", "edgecolor": GREY, "hatch": "////", "linewidth": 0.8}
    return {"color": "#b9bec7"}
