"""The page's tables, from the results; `--write` puts them between their marks in README.md.

    python examples/evidence/tables.py --write

Means over the seeds. Intervals: paired differences of the losses item by item, averaged over seeds, 95% by bootstrap
over items. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "README.md"
ABILITY, OTHER, OPEN = "geography", "other", "open"
KEPT = {"german": "german", "code": "code", "sibling": "german"}
WHOLE = (ABILITY, OTHER)  # skills whose answers are right or wrong as a whole
UNDRAWN = {"interpolation", "TIES", "LiNeS", "layer swap", "embedding and norms alone", "channels by weight"}
DRAWS = 1000

Result = dict[str, Any]
Runs = Mapping[str, list[Result]]  # method -> its results, by seed


def load(pair: str, results: Path = RESULTS) -> Runs:
    """All results of a pair, methods in the order of the list."""
    found: dict[str, list[Result]] = defaultdict(list)
    for path in sorted((results / pair).glob("*.json")):
        result = json.loads(path.read_text())
        found[result["method"]].append(result)
    order = json.loads((results / "order.json").read_text())
    return {name: found[name] for name in sorted(found, key=order.index)}


# ------------------------------------------------------------------------------------------------------- figures ---


def average(runs: Sequence[Result], skill: str, figure: str) -> float:
    """Mean over the seeds."""
    return mean(run["test"][skill][figure] for run in runs)


def flips(base: Result, runs: Sequence[Result], skill: str) -> tuple[float, float]:
    """How many answers (tokens of texts) go from right to wrong and from wrong to right, mean over the seeds."""
    before = _right(base["test"][skill], whole=skill in WHOLE)
    pairs = [list(zip(before, _right(run["test"][skill], whole=skill in WHOLE), strict=True)) for run in runs]
    return mean(p.count((True, False)) for p in pairs), mean(p.count((False, True)) for p in pairs)


def _right(scored: Mapping[str, Any], *, whole: bool) -> list[bool]:
    hits = [digit == "1" for digit in scored["hits"]]
    if not whole:
        return hits
    answers, start = [], 0
    for count in scored["tokens"]:
        answers.append(all(hits[start : start + count]))
        start += count
    return answers


def recovered(base: Result, donor: Result, runs: Sequence[Result], skill: str) -> float:
    """Share of the gap between base and donor in the skill's loss that is closed."""
    before, after = base["test"][skill]["nll"], donor["test"][skill]["nll"]
    return (before - average(runs, skill, "nll")) / (before - after)


def seconds_a_run(result: Result) -> float:
    """CPU seconds of one model; settings that differ only in steps come out of one run."""
    runs = {json.dumps({**entry["setting"], "steps": None}) for entry in result["tried"]}
    return result["seconds_a_setting"] * len(result["tried"]) / len(runs)


Interval = tuple[float, float, float]  # mean, and the ends of its 95% interval


def difference(runs: Sequence[Result], others: Sequence[Result], skill: str) -> Interval:
    """Loss of the first less that of the second in nats a token, paired by items."""
    tokens = runs[0]["test"][skill]["tokens"]
    first, second = (_by_item([run["test"][skill]["losses"] for run in chosen]) for chosen in (runs, others))
    return _bootstrapped([a - b for a, b in zip(first, second, strict=True)], tokens)


def accuracy_difference(runs: Sequence[Result], others: Sequence[Result], skill: str) -> Interval:
    """Share of right answers of the first less that of the second, paired by items."""
    first, second = (_by_item([_right(run["test"][skill], whole=True) for run in chosen]) for chosen in (runs, others))
    return _bootstrapped([a - b for a, b in zip(first, second, strict=True)], [1] * len(first))


def same_seeds(runs: Sequence[Result], others: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """The results of seeds that both have; methods that draw nothing have one result for all seeds."""
    if any(chosen[0]["method"] in UNDRAWN for chosen in (runs, others)):
        return list(runs), list(others)
    common = {run["seed"] for run in runs} & {run["seed"] for run in others}
    return [run for run in runs if run["seed"] in common], [run for run in others if run["seed"] in common]


def _by_item(values: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds."""
    return [mean(map(float, of_item)) for of_item in zip(*values, strict=True)]


def _bootstrapped(items: Sequence[float], weights: Sequence[int]) -> Interval:
    """Sum of the items over the sum of their weights, with an interval by drawing items."""
    generator, indices, draws = random.Random(0), range(len(items)), []
    for _ in range(DRAWS):
        drawn = generator.choices(indices, k=len(items))
        draws.append(sum(items[i] for i in drawn) / sum(weights[i] for i in drawn))
    draws.sort()
    return sum(items) / sum(weights), draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS) - 1]


# -------------------------------------------------------------------------------------------------------- tables ---


def main_table(pair: str, runs: Runs) -> str:
    """One line for each method."""
    base, donor = runs["base"][0], runs["donor"][0]
    kept = KEPT[pair]
    text = next(skill for skill in base["test"] if skill not in (ABILITY, OTHER, OPEN, kept))
    head = [
        "method",
        "seeds",
        "settings",
        "ability",
        "−/+",
        "NLL",
        f"{kept} NLL",
        "cost",
        "KL",
        "other facts",
        "−/+",
        "NLL",
    ]
    head += ["open NLL", f"{text} NLL", "ability back", "untouched back", "CPU s", "MB"]
    lines = []
    for name, results in runs.items():
        lost, won = flips(base, results, ABILITY)
        other_lost, other_won = flips(base, results, OTHER)
        cost = average(results, kept, "nll") - base["test"][kept]["nll"]
        untouched = mean(recovered(base, donor, results, skill) for skill in (OTHER, OPEN))
        ends = name in ("base", "donor")
        lines.append(
            [
                name,
                str(len(results)),
                str(max(len(result["tried"]) for result in results)),
                f"{average(results, ABILITY, 'accuracy'):.3f}",
                f"{lost:.0f}/{won:.0f}",
                f"{average(results, ABILITY, 'nll'):.3f}",
                f"{average(results, kept, 'nll'):.3f}",
                f"{cost:+.3f}",
                f"{average(results, kept, 'divergence'):.3f}",
                f"{average(results, OTHER, 'accuracy'):.3f}",
                f"{other_lost:.0f}/{other_won:.0f}",
                f"{average(results, OTHER, 'nll'):.3f}",
                f"{average(results, OPEN, 'nll'):.3f}",
                f"{average(results, text, 'nll'):.3f}",
                "" if ends else f"{recovered(base, donor, results, ABILITY):.0%}",
                "" if ends else f"{untouched:.0%}",
                "" if ends else f"{mean(map(seconds_a_run, results)):.0f}",
                "" if ends else f"{results[0]['numbers'] * 2 / 1e6:.1f}",
            ]
        )
    return table(head, lines)


def paired_table(pair: str, runs: Runs, compared: Sequence[tuple[str, str]]) -> str:
    """Differences of losses between two methods, those that were run."""
    skills = list(runs["base"][0]["test"])
    lines = []
    for first, second in compared:
        if first in runs and second in runs:
            ours, theirs = same_seeds(runs[first], runs[second])
            found = [accuracy_difference(ours, theirs, skill) for skill in WHOLE]
            found += [difference(ours, theirs, skill) for skill in skills]
            lines.append([f"{first} against {second}", *map(_interval, found)])
    return table(["", "ability accuracy", "other facts accuracy", *(f"{skill} NLL" for skill in skills)], lines)


def _interval(found: Interval) -> str:
    value, low, high = found
    text = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def settings_table(runs: Runs) -> str:
    """What was chosen on validation items, first seed, and what was tried."""
    lines = []
    for name, results in runs.items():
        for entry in results[0]["tried"]:
            if entry["setting"]:
                described = ", ".join(f"{key} {value:g}" for key, value in entry["setting"].items())
                chosen = "chosen" if entry["setting"] == results[0]["setting"] else ""
                figures = [f"{entry[key]:.3f}" for key in ("ability_accuracy", "ability_nll", "kept_nll")]
                lines.append([name, described, *figures, chosen])
    return table(["method", "setting", "ability", "NLL", "kept NLL", ""], lines)


def missing_table(results: Path) -> str:
    """By pair, the methods that have no result."""
    order = json.loads((results / "order.json").read_text())
    lines = []
    for pair in KEPT:
        runs = load(pair, results) if (results / pair).is_dir() else {}
        names = [name for name in order if name not in runs]
        lines.append([pair, "; ".join(names) or "nothing"])
    return table(["pair", "not run"], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


COMPARED = [
    ("fitted", "interpolation"),
    ("fitted", "LoRA, base keeps"),
    ("fitted", "LoRA, donor teaches, base keeps"),
    ("fitted, best 20% of all rows together, and tokens", "fitted, best 20% of rows and tokens"),
    ("fitted, rank 16", "fitted"),
    ("fitted, rank 16, embedding too", "fitted"),
    ("fitted, rank 16, embedding too", "LoRA, donor teaches, base keeps"),
    ("fitted, rank 16, norms, 20% of tokens", "fitted"),
    ("fitted, then LoRA, base keeps", "fitted"),
    ("fitted, then LoRA, base keeps", "LoRA, base keeps"),
    ("fitted, then LoRA, donor teaches, base keeps", "fitted"),
    ("fitted, then LoRA, donor teaches, base keeps", "LoRA, base keeps"),
    ("fitted, then LoRA, donor teaches, base keeps", "LoRA, donor teaches, base keeps"),
    ("fitted, then LoRA, base keeps", "LoRA from interpolation, base keeps"),
    ("fitted rank 16, then trained, base keeps", "LoRA, base keeps"),
    ("fitted rows, then trained, base keeps", "rows by activation, base keeps"),
    ("fitted rows by gain, linear layers alone", "fitted rows by activation, linear layers alone"),
    ("fitted rows by gain, linear layers alone", "fitted rows at random, linear layers alone"),
    ("channels by gain", "channels by activation"),
    ("channels by gain", "channels at random"),
]


def all_tables(results: Path = RESULTS) -> dict[str, str]:
    """By the name of its mark in the page."""
    makers: dict[str, Callable[[str, Runs], str]] = {
        "main": main_table,
        "paired": lambda pair, runs: paired_table(pair, runs, COMPARED),
        "settings": lambda pair, runs: settings_table(runs),
    }
    found = {}
    for pair in KEPT:
        runs = load(pair, results) if (results / pair).is_dir() else {}
        if "base" in runs and "donor" in runs:
            found |= {f"{pair} {kind}": make(pair, runs) for kind, make in makers.items()}
    return found | {"not run": missing_table(results)}


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with every table between its marks."""

    def put(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{tables.get(name, 'Not run yet.')}\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z ]+) -->\n.*?<!-- end -->", put, page, flags=re.S)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into README.md")
    arguments = parser.parse_args(argv)
    tables = all_tables(arguments.results)
    if arguments.write:
        PAGE.write_text(filled(PAGE.read_text(), tables))
        return
    for name, text in tables.items():
        print(f"## {name}\n\n{text}\n")


if __name__ == "__main__":
    main()
