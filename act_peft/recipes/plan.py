"""What a recipe will do, and what memory and disk it needs, from the headers of the checkpoints alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from act_peft.disk.checkpoint import Checkpoint
from act_peft.recipes.schema import Recipe
from act_peft.transfer.donors import is_adapter

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_TRAINED = 16  # bytes of a value that trains: itself, gradient and Adam's two moments in float32


def plan_lines(recipe: Recipe, output: Path) -> list[str]:
    """The steps of a recipe, and what they need.

    Args:
        recipe: the recipe.
        output: its folder.

    Raises:
        ActValueError: a checkpoint that is not there.
    """
    with Checkpoint.open(recipe.base) as base:
        values = {name: _product(base.shape(name)) for name in base.names}
        stored = sum(count * base.dtype(name).itemsize for name, count in values.items())
    count = sum(values.values())
    model = stored if recipe.dtype == "auto" else count * _BYTES[recipe.dtype]
    selected = recipe.select.density * count if recipe.method != "lora" else _lora_values(recipe, values)
    return [
        *(f"{number}. {step}" for number, step in enumerate(_steps(recipe), 1)),
        f"base: {count / 1e6:.1f} million parameters, {_size(stored)} on disk",
        f"memory: about {_size(_memory(recipe, model, selected))}, activations not counted",
        f"disk: about {_size(_disk(recipe, stored, count, selected))} in {output}",
    ]


def _steps(recipe: Recipe) -> Iterator[str]:
    skills = ", ".join([*recipe.abilities, *recipe.keep, *recipe.untouched])
    yield f"measure base and donor on held-out examples of {skills}"
    if recipe.method == "fit":
        kept = f", keeping {', '.join(recipe.keep)} (keep_weight {recipe.fit.keep_weight:g})" if recipe.keep else ""
        yield f"fit the donor's difference on {', '.join(recipe.abilities)}{kept}"
    elif recipe.method == "localize":
        yield f"score every channel on {', '.join(recipe.abilities)} ({recipe.localize.score})"
    if recipe.method != "lora":
        what = f"the best {recipe.select.density:.0%} of the channels of {_scope(recipe)}"
        share = f", {recipe.localize.transfer_scale:g} of their difference" if recipe.method == "localize" else ""
        yield f"select {what}{share}; measure"
    if recipe.train is not None:
        train = recipe.train
        length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
        teachers = ["labels"]
        teachers += ["the base on what is kept"] if train.keep_weight and recipe.keep else []
        teachers += ["the donor"] if train.donor_weight else []
        what = f"LoRA of rank {recipe.lora.rank}" if recipe.method == "lora" else "the selected channels"
        size = f"{length} of {train.batch_size} examples" if train.steps else length
        yield f"fine-tune {what}: {train.trainer}, {size}, taught by {', '.join(teachers)}; measure"
    if recipe.output.merged:
        yield "write a merged checkpoint"
    if recipe.output.lora_rank is not None:
        yield f"export a LoRA adapter of rank {recipe.output.lora_rank} for {recipe.output.lora_target.value}"


def _memory(recipe: Recipe, model: float, selected: float) -> float:
    """The largest of what the steps hold: two models, or one with what trains."""
    donors = {donor for donor in recipe.donors() if donor is not None and not is_adapter(donor)}
    both = model * (1 + len(donors))
    if recipe.train is None:
        return both
    teacher = model if recipe.train.donor_weight and donors else 0
    return max(both, model + teacher + selected * _TRAINED)


def _disk(recipe: Recipe, stored: float, count: int, selected: float) -> float:
    needed = selected * 4  # float32
    if recipe.method == "fit":
        needed += count * 4 + selected * 4  # the fit, and the adapter before the fine-tune
    elif recipe.method == "localize":
        needed += selected * 4
    if recipe.train is not None:
        needed += selected * 12  # a checkpoint of the trainer
    return needed + stored * recipe.output.merged


def _lora_values(recipe: Recipe, values: dict[str, int]) -> float:
    """About as many as LoRA has on square matrices."""
    return sum(2 * recipe.lora.rank * count**0.5 for count in values.values())


def _scope(recipe: Recipe) -> str:
    return "every module" if recipe.select.scope == "module" else "all modules together"


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
