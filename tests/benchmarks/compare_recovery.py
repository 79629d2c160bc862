"""How much of a lost ability each method brings back, and at what price, on the tiny family.

Spanish is to be recovered, German to be kept, English is what nobody trains on. Every method sees the same training
problems of Spanish and German. Its settings are tried on all seeds; among those that cost on average at most
`--max-drop` of the kept skill on validation problems, the one that recovers most there is reported on test problems
(the one that costs least, if all cost more). Results are cached, so that a second run costs nothing; families that
`--families` lacks are trained first (about two minutes each).

    python -m tests.benchmarks.compare_recovery --families families --cache recovery.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from act_peft.errors import ActWarning
from tests.benchmarks.recovery.families import ABILITY, KEPT, UNTOUCHED, Accuracies, Family
from tests.benchmarks.recovery.methods import METHODS, Budget, Setting

Result = dict[str, Accuracies]  # "validation" and "test" -> language -> accuracy


class Study:
    """All methods on some families.

    Args:
        families: By seed.
        budget: What every trained method may spend.
        cache: A JSON file of results, read and extended.
    """

    def __init__(self, families: dict[int, Family], budget: Budget, cache: Path) -> None:
        self.families, self.budget, self._cache = families, budget, cache
        self._results: dict[str, Result] = json.loads(cache.read_text()) if cache.exists() else {}

    def key(self, method: str, setting: Setting, seed: int) -> str:
        """The name of one run in the cache."""
        family = self.families[seed]
        sizes = (family.examples, family.validation, family.test)
        return json.dumps([method, setting, seed, asdict(self.budget), sizes], sort_keys=True)

    def result(self, method: str, setting: Setting, seed: int) -> Result:
        """What one run reaches, from the cache if it was run before."""
        key, family = self.key(method, setting, seed), self.families[seed]
        if key not in self._results:
            start = time.process_time()
            model = METHODS[method].build(family, self.budget, setting)
            self._results[key] = {"validation": family.validate(model), "test": family.measure(model)}
            self._results[key]["seconds"] = {"cpu": time.process_time() - start}
            self._cache.write_text(json.dumps(self._results, indent=1))
        return self._results[key]

    def validated(self, method: str, setting: Setting) -> dict[str, float]:
        """Accuracy in ability and kept skill on validation problems, the mean over the seeds."""
        found = [self.result(method, setting, seed)["validation"] for seed in self.families]
        return {skill.value: statistics.mean(f[skill.value] for f in found) for skill in (ABILITY, KEPT)}

    def choose(self, method: str, settings: Sequence[Setting], *, max_drop: float, start: str) -> Setting:
        """The best setting of a method; test problems play no part.

        Args:
            method: Which.
            settings: Those that are tried.
            max_drop: How much of the kept skill may be lost.
            start: The method whose model is the base.
        """
        floor = self.validated(start, {})[KEPT.value] - max_drop
        found = [(self.validated(method, setting), setting) for setting in settings]
        keeping = [(values[ABILITY.value], setting) for values, setting in found if values[KEPT.value] >= floor]
        candidates = keeping or [(values[KEPT.value], setting) for values, setting in found]
        return max(candidates, key=lambda candidate: candidate[0])[1]

    def row(self, method: str, setting: Setting, *, start: str, end: str) -> list[str]:
        """One line of the table: mean and range over the seeds, on test problems.

        Args:
            method: Which.
            setting: The chosen one.
            start: The method whose model is the base.
            end: The method whose model is the donor.
        """
        before, after, full = (
            [self.result(name, chosen, seed)["test"] for seed in self.families]
            for name, chosen in ((start, {}), (method, setting), (end, {}))
        )
        ability, kept, untouched = ([a[skill.value] for a in after] for skill in (ABILITY, KEPT, UNTOUCHED))
        runs = list(zip(before, after, full, strict=True))
        recovered = [(a[ABILITY.value] - b[ABILITY.value]) / (d[ABILITY.value] - b[ABILITY.value]) for b, a, d in runs]
        lost = [b[KEPT.value] - a[KEPT.value] for b, a, _ in runs]
        return [method, *(_with_range(values) for values in (ability, recovered, kept, lost, untouched))]


def _with_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.2f} to {max(values):.2f})"


HEADER = ["method", "Spanish", "recovered share", "German", "German lost", "English (untouched)"]


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=Path, required=True, help="holds family_seed<N>/{base,donor}")
    parser.add_argument("--cache", type=Path, required=True, help="JSON file of results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--examples", type=int, default=300, help="training problems of each of the two skills")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--steps", type=int, default=225)
    parser.add_argument("--row-steps", type=int, default=75, help="how many of them train rows, after scales")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--settings", type=int, default=None, help="try only the first settings of every method")
    parser.add_argument("--max-drop", type=float, default=0.04, help="of the kept skill, on validation problems")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ActWarning)  # relatives that drifted apart are what this is about

    sizes = {"examples": args.examples, "validation": args.validation, "test": args.test}
    families = {seed: Family.of_seed(seed, args.families, **sizes) for seed in args.seeds}
    study = Study(families, Budget(args.steps, args.row_steps, args.batch_size), args.cache)
    table = []
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for method in args.methods:
        settings = METHODS[method].settings[: args.settings]
        chosen = study.choose(method, settings, max_drop=args.max_drop, start="base")
        table.append([*study.row(method, chosen, start="base", end="donor"), _described(chosen)])
        print(
            f"| {' | '.join(table[-1][:-1])} |  <!-- {table[-1][-1]}, best of {len(settings)} settings -->", flush=True
        )
    return table


def _described(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in setting.items()) or "no setting"


if __name__ == "__main__":
    main()
