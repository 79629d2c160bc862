"""What to do with the recommendation of a sweep."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from act_peft.sweeps.result import SweepResult
    from act_peft.sweeps.rows import SweepRow

_FITTED, _MASK, _OUTPUT = "fitted.safetensors", "mask.safetensors", "ability"


def next_steps(result: SweepResult, arguments: argparse.Namespace) -> list[str]:
    """The lines to print after the table: commands that make what is recommended.

    Args:
        result: of the sweep.
        arguments: of `act-peft sweep`, which say where models and examples are.
    """
    best = result.recommended
    if best is None:
        limit = "--max-drop" if result.max_keep_loss is None else "--max-keep-loss"
        return ["next: nothing is worth taking within this limit", f"  allow more with {limit}, or try other examples"]
    if best.method.value == "channels":
        commands = _channels(best, result, arguments)
    elif best.method.is_fitted or best.method.value == "interpolation":
        commands = _fit(best, result.fit_settings, arguments)
    else:
        return ["next: in Python, for every parameter of the base (act_peft.sweeps.weight_rules):", f"  {_rule(best)}"]
    return ["next:", *(f"  {shlex.join(['act-peft', *command])}" for command in commands)]


def _channels(best: SweepRow, result: SweepResult, arguments: argparse.Namespace) -> list[list[str]]:
    models = ["--base", arguments.base, "--donor", arguments.donor]
    how = ["--density", f"{best.density:g}", "--scope", result.scope.value, "--normalize", result.normalize.value]
    scale = ["--transfer-scale", f"{best.transfer_scale:g}"]
    return [
        ["select", str(arguments.scores), *how, "--output", _MASK],
        ["transfer", *models, "--mask", _MASK, *scale, "--output", _OUTPUT],
    ]


def _fit(best: SweepRow, settings: dict[str, float], arguments: argparse.Namespace) -> list[list[str]]:
    examples = ["--dataset", arguments.fit_dataset or arguments.dataset]
    examples += ["--keep-dataset", *(arguments.fit_keep_dataset or arguments.keep_dataset)]
    numbers = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", f"{value:.6g}")]
    rank = ["--max-rank", f"{best.settings.get('rank', 0):g}"]
    models = ["--base", arguments.base, "--donor", arguments.donor]
    commands = [["fit", *models, *examples, *_reading(arguments), *numbers, *rank, "--output", _FITTED]]
    made = ["transfer", "--fitted", _FITTED, "--base", arguments.base]
    if best.method.value == "fitted-rows":
        share = f"{best.density:g}"
        commands.append(["select", _FITTED, "--density", share, "--scope", "module", "--output", _MASK])
        made += ["--mask", _MASK, "--tokens", share]
    elif best.method.value == "fitted-rank":
        made += ["--norms"]
        options = {name: best.settings[name] for name in ("rank", "tokens", "embedding_rank") if name in best.settings}
        made += [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", f"{value:g}")]
    return [*commands, [*made, "--output", _OUTPUT]]


def _reading(arguments: argparse.Namespace) -> list[str]:
    """How examples are read, where it is not as `act-peft fit` does it by itself."""
    usual = {"split": "train", "samples": 100, "max_length": 1024, "dtype": "auto", "seed": 0}
    given = {name: getattr(arguments, name) for name in usual}
    options = [(f"--{name.replace('_', '-')}", str(given[name])) for name in usual if given[name] != usual[name]]
    return [text for option in options for text in option] + ["--assistant-only"] * arguments.assistant_only


def _rule(best: SweepRow) -> str:
    """A call of the rule, as text."""
    names = {"layer-swap": "LayerSwap", "lines": "LayerScaling", "ties": "Ties", "dare": "Dare"}
    values = [f"{name}={value:g}" for name, value in best.settings.items()]
    if best.method.value in ("layer-swap", "lines"):
        values.append("num_layers=...")
    return f"parameter += {names[best.method.value]}({', '.join(values)})(name, donor_parameter - parameter)"
