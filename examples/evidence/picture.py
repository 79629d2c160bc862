"""The picture of the main README: where the gain of the fit lies, and the answers before and after.

python examples/evidence/picture.py --folder evidence    # fit once, write results/gains.json, then draw
python examples/evidence/picture.py                      # draw again from the results
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from tables import HERE, RESULTS, average, load

GAINS, PICTURE = RESULTS / "gains.json", HERE / "picture.png"
PAIR, SETTING = "german", {"keep_weight": 3.0, "ridge": 0.03, "prior_scale": 0.0}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {"base": "#b9bec7", "interpolation": "#88ccee", "fitted": "#117733", "donor": "#6c7380"}
SKILLS = {  # skill -> label, figure
    "geography": ("ability\n(questions, lost)", "accuracy"),
    "other": ("untouched\n(other facts)", "accuracy"),
    "german": ("kept\n(German, token by token)", "token_accuracy"),
}
INK = "#23272e"


def measure_gains(folder: Path) -> None:
    """Fit the pair, and write the gain of every module."""
    from fitting import fitted
    from study import Study

    gains = fitted(Study(folder, PAIR, seed=0), SETTING).gains
    sums = {name: round(float(values.sum()), 6) for name, values in gains.items()}
    GAINS.write_text(json.dumps({"setting": SETTING, "gains": sums}, indent=1) + "\n")


def shares() -> list[list[float]]:
    """Share of all gain, in percent, of every kind in every layer: kinds x layers."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    gains = json.loads(GAINS.read_text())["gains"]
    for name, gain in gains.items():
        parts = name.split(".")
        if parts[-1] in KINDS:
            found[parts[-1]][int(parts[2])] = gain
    total = sum(gain for layers in found.values() for gain in layers.values())
    return [[100 * found[kind][layer] / total for layer in sorted(found[kind])] for kind in KINDS]


def draw(path: Path) -> None:
    """Draw both halves."""
    plt.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), width_ratios=(1.1, 1), layout="constrained")
    values = shares()
    most = max(map(max, values))
    scale = LogNorm(vmin=most / 1e4, vmax=most, clip=True)
    image = left.imshow(values, aspect="auto", cmap="Greens", norm=scale)
    left.set_yticks(range(len(KINDS)), KINDS)
    left.set_xlabel("layer")
    top = max(range(len(KINDS)), key=lambda row: sum(values[row]))
    left.set_title(
        f"Where the lost ability sits: {KINDS[top]} holds {sum(values[top]):.0f}% of the gain", loc="left", fontsize=10
    )
    figure.colorbar(image, ax=left, label="share of the gain (%, logarithmic)", pad=0.02)

    runs = load(PAIR)
    width = 0.8 / len(MODELS)
    for number, (model, colour) in enumerate(MODELS.items()):
        heights = [100 * average(runs[model], skill, figure_name) for skill, (_, figure_name) in SKILLS.items()]
        places = [place + (number - (len(MODELS) - 1) / 2) * width for place in range(len(SKILLS))]
        bars = right.bar(places, heights, width * 0.92, color=colour, edgecolor=INK, linewidth=0.5, label=model)
        right.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    right.set_xticks(range(len(SKILLS)), [label for label, _ in SKILLS.values()])
    right.set_ylim(0, 118)
    right.set_ylabel("right answers (%)")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(ncols=len(MODELS), loc="upper center", frameon=False, fontsize=8)
    fits, base, donor = (average(runs[name], "geography", "accuracy") for name in ("fitted", "base", "donor"))
    right.set_title(
        f"The fit brings back {100 * (fits - base) / (donor - base):.0f}% of the lost answers, untrained",
        loc="left",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    """Fit if asked to, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="folder of the study's models and data: fit them first (no fit)")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        measure_gains(arguments.folder)
    draw(PICTURE)


if __name__ == "__main__":
    main()
