"""A recipe from beginning to end: fit or localize, select, transfer, fine-tune, measure, merge, export."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from act_peft.adapter.card import add_to_card
from act_peft.channels.kinds import kind_of
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.data.models import load_tokenizer, open_device
from act_peft.disk.atomic import new_folder, write_file
from act_peft.errors import ActValueError
from act_peft.evaluation import Evaluation, evaluate
from act_peft.export import check_lora, export_lora
from act_peft.fitting import FittedTransfer, fit
from act_peft.localization import localize
from act_peft.merge import merge_checkpoint
from act_peft.recipes.datasets import Skills
from act_peft.recipes.models import Models
from act_peft.recipes.reading import card_section
from act_peft.recipes.schema import Recipe, Train
from act_peft.recipes.steps import RECORD, Report, Steps
from act_peft.recipes.surroundings import quiet
from act_peft.recipes.training import TrainingRun, fine_tune, save_adapter
from act_peft.training.donor import DonorCallback
from act_peft.training.keep import KeepCallback
from act_peft.transfer.on_disk import create_adapter

FITTED, SCORES, MASK = "fitted.safetensors", "scores.safetensors", "mask.safetensors"
START, TRAINING, ADAPTER, MERGED, LORA = "start", "training", "adapter", "merged", "lora"
_ADAPTER_FILES = (f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json")  # the card comes later


@dataclass(frozen=True)
class RecipeResult:
    """What a recipe made.

    Attributes:
        folder: of everything.
        paths: result -> path of its file or folder.
        evaluation: base, donors, the transfer alone and the result, on the held-out examples of every skill.
        reused: steps that were not run, because an earlier run had done them.
    """

    folder: Path
    paths: Mapping[str, Path]
    evaluation: Evaluation
    reused: tuple[str, ...]


def run_recipe(
    recipe: Recipe,
    *,
    output: str | os.PathLike[str] | None = None,
    report: Report = lambda line: None,
    overwrite: bool = False,
) -> RecipeResult:
    """Do what a recipe says. A run that was interrupted is continued by calling this again.

    A step is reused if the folder holds its files, unchanged, from a run with the same settings, data and versions.

    Args:
        recipe: the recipe.
        output: a folder of an earlier run, an empty one, or a new one; in place of the recipe's.
        report: called with one line when a step is done.
        overwrite: do every step again.

    Raises:
        ActValueError: no output folder, or one that holds something else; models or examples that cannot be loaded or
            do not fit.

    Example:
        >>> result = run_recipe(read_recipe("recover.yaml"), output="recovered")
        >>> print(result.evaluation)
    """
    folder = recipe.output.folder if output is None else output
    if folder is None:
        raise ActValueError("output.folder is missing, expected a folder (or name it with --output)")
    with quiet():
        return _Run(recipe, Path(folder), report, overwrite).run()


class _Run:
    """One run: the steps in their order, and the record for later runs."""

    def __init__(self, recipe: Recipe, folder: Path, report: Report, overwrite: bool) -> None:
        self.recipe, self.folder, self.report = recipe, folder, report
        self.device = open_device(recipe.device)
        self.models = Models(recipe, self.device)
        self.skills = Skills(recipe, self.models.base, load_tokenizer(recipe.base), report)
        self.steps = Steps(folder, report, overwrite, owner="a recipe")

    def run(self) -> RecipeResult:
        recipe, started = self.recipe, time.perf_counter()
        known = {"reading": recipe.reading.model_dump(), "seed": recipe.seed, "inputs": _states(recipe)}
        measured = dict(self.steps.run("measure base and donor", known, (), self._measure_originals))
        parts = {"method", "dtype", "fit", "localize", "select", "lora"}
        made: dict[str, Any] = known | recipe.model_dump(include=parts)
        made["becomes_lora"] = self._becomes_lora and self.recipe.output.lora_target.value
        if recipe.method != "lora":
            measured["transferred"] = self._transfer(made)
        if recipe.train is not None:
            tuned = made | {"train": recipe.train.model_dump()}
            self.steps.run("fine-tune", tuned, _ADAPTER_FILES, lambda: self._fine_tune(tuned))
            measured["fine-tuned"] = self.steps.run("measure the result", tuned, (), self._measure_adapter)
            made = tuned
        else:
            self.steps.run("copy the adapter", made, _ADAPTER_FILES, self._copy_start)
        self._write_outputs(made)
        evaluation = Evaluation.from_dict(measured)
        add_to_card(self.folder / ADAPTER, "recipe", f"{card_section(recipe)}\n```text\n{evaluation}\n```\n")
        write_file(self.folder / "evaluation.json", f"{json.dumps(evaluation.to_dict(), indent=1)}\n".encode())
        self.report(f"done in {time.perf_counter() - started:.0f} s")
        return RecipeResult(self.folder, self._paths(), evaluation, tuple(self.steps.reused))

    # ---------------------------------------------------------------------------------------------------- steps ---

    def _measure_originals(self) -> dict[str, Any]:
        base = self.models.base()
        found = {"base": self._measure(base)}
        donors = dict(zip(self.recipe.abilities, self.recipe.donors(), strict=True))
        one = len(set(donors.values())) == 1
        for ability, donor in {None: next(iter(donors.values()))}.items() if one else donors.items():
            if donor is not None:
                found["donor" if ability is None else f"donor of {ability}"] = self._measure(
                    self.models.whole_donor(donor)
                )
        return found

    def _transfer(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """From the two models to an adapter with a part of their difference; its figures."""
        if self.recipe.method == "fit":
            self.steps.run("fit", {**settings, "select": None, "becomes_lora": None}, (FITTED,), self._fit)
        else:
            self.steps.run("localize", {**settings, "select": None, "becomes_lora": None}, (SCORES,), self._localize)
        self.steps.run("select and transfer", settings, (MASK, START), self._select)
        return self.steps.run("measure the transfer", settings, (), lambda: self._measure_folder(START))

    def _fit(self) -> None:
        recipe, base = self.recipe, self.models.base()
        donors = [self.models.donor(name) for name in recipe.donors() if name is not None]
        batch_size = recipe.reading.batch_size
        abilities = [self.skills.training_rows([name]).batches(batch_size) for name in recipe.abilities]
        keep = self.skills.training_rows(recipe.keep).batches(batch_size) if recipe.keep else None
        fit(base, donors, abilities, keep, **recipe.fit.model_dump(), max_rank=0).save(self.folder / FITTED)

    def _localize(self) -> None:
        recipe, base = self.recipe, self.models.base()
        batch_size = recipe.reading.batch_size
        data: dict[str, Any] = {}
        if recipe.localize.score != "weight":
            data["dataloader"] = self.skills.training_rows(recipe.abilities).batches(batch_size)
        if recipe.localize.score == "contrast":
            data["keep_dataloader"] = self.skills.training_rows(recipe.keep).batches(batch_size)
        donor = self.models.donor(str(recipe.donors()[0]))
        localize(base, donor, score=recipe.localize.score, **data).save(self.folder / SCORES)

    def _select(self) -> str:
        recipe = self.recipe
        options = {"scope": recipe.select.scope, "max_channels": recipe.select.max_channels}
        written: dict[str, Any] = {"include_bias": not self._becomes_lora, "overwrite": True}
        start = self.folder / START
        if recipe.method == "fit":
            fitted = FittedTransfer.load(self.folder / FITTED)
            mask = self._best(fitted.gains, options)
            tokens = recipe.select.density if recipe.select.tokens is None else recipe.select.tokens
            tokens = tokens if fitted.token_gains and not self._becomes_lora else 0
            fitted.to_adapter(mask, start, tokens=tokens or None, base=recipe.base, **written)
        else:
            mask = self._best(ChannelScores.load(self.folder / SCORES), options)
            donor, scale = str(recipe.donors()[0]), recipe.localize.transfer_scale
            create_adapter(recipe.base, donor, mask, start, transfer_scale=scale, **written)
        if self._becomes_lora:
            check_lora(start, **self._lora_options())
        mask.save(self.folder / MASK)
        self.report(f"selected: {mask}")
        return str(mask)

    def _best(self, scores: ChannelScores, options: Mapping[str, Any]) -> ChannelMask:
        mask = scores.top(self.recipe.select.density, **options)
        if self._becomes_lora:
            mask = _without_norms(mask, self.skills.base)
        if not mask.num_selected:
            raise ActValueError(
                f"select.density: got {self.recipe.select.density}, expected a share that selects at least one channel"
            )
        return mask

    def _fine_tune(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        recipe, train = self.recipe, self.recipe.train
        assert train is not None
        model = self._trainable()
        if train.trainer == "sft":
            examples = self.skills.training_rows(recipe.abilities).rows
        else:
            examples = concatenate_datasets([self.skills.train[name] for name in recipe.abilities])
        training = TrainingRun(
            examples=examples,
            tokenizer=self.skills.tokenizer,
            folder=self._training_folder(settings),
            teachers=self._teachers(),
            seed=recipe.seed,
            device=self.device,
            max_length=recipe.reading.max_length,
            donor=self.models.whole_donor(str(recipe.donors()[0])) if train.trainer == "distillation" else None,
        )
        log = fine_tune(model, train, training, self.report)
        save_adapter(model, self.folder / ADAPTER, overwrite=True)
        shutil.rmtree(self.folder / TRAINING, ignore_errors=True)
        return log

    def _trainable(self) -> PeftModel:
        if self.recipe.method != "lora":
            return self.models.adapted(str(self.folder / START), trainable=True)
        lora = self.recipe.lora
        torch.manual_seed(self.recipe.seed)  # LoRA starts from random numbers
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.rank, target_modules=lora.target_modules, task_type="CAUSAL_LM"
        )
        return get_peft_model(self.models.base(), config)

    def _teachers(self) -> list[TrainerCallback]:
        recipe, train = self.recipe, self.recipe.train
        assert train is not None
        teachers: list[TrainerCallback] = []
        if train.keep_weight and recipe.keep:
            batches = self._batches(recipe.keep, train)
            many = train.batch_size // train.micro_batch_size
            teachers.append(KeepCallback(batches, weight=train.keep_weight, batches_per_step=many))
        if train.donor_weight:
            batches = self._batches(recipe.abilities, train)
            many = train.batch_size // train.micro_batch_size
            donor = self.models.donor(str(recipe.donors()[0]))
            teachers.append(DonorCallback(donor, batches, weight=train.donor_weight, batches_per_step=many))
        return teachers

    def _training_folder(self, settings: Mapping[str, Any]) -> Path:
        """The folder of the trainer's checkpoints. Those of other settings are removed."""
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        parent = self.folder / TRAINING
        for other in parent.glob("*"):
            if other.name != name:
                shutil.rmtree(other)
        return parent / name

    def _write_outputs(self, settings: Mapping[str, Any]) -> None:
        output = self.recipe.output
        if output.merged:
            self.steps.run("merge", settings, (MERGED,), self._merge)
        if output.lora_rank is not None:
            self.steps.run(
                "export",
                {**settings, "rank": output.lora_rank, "target": output.lora_target.value},
                (LORA,),
                self._export,
            )

    def _merge(self) -> None:
        if self.recipe.method != "lora":
            merge_checkpoint(self.recipe.base, self.folder / ADAPTER, self.folder / MERGED, overwrite=True)
            return
        with new_folder(self.folder / MERGED, overwrite=True) as folder:
            self.models.adapted(str(self.folder / ADAPTER)).merge_and_unload().save_pretrained(folder)
            self.skills.tokenizer.save_pretrained(folder)

    def _export(self) -> None:
        options = self._lora_options()
        export_lora(self.folder / ADAPTER, self.folder / LORA, uniform_rank=True, overwrite=True, **options)

    def _lora_options(self) -> dict[str, Any]:
        """What `export_lora` and the check before the fine-tune take."""
        output = self.recipe.output
        return {"target": output.lora_target, "max_rank": output.lora_rank, "base": self.recipe.base}

    # -------------------------------------------------------------------------------------------------- helpers ---

    @property
    def _becomes_lora(self) -> bool:
        return self.recipe.output.lora_rank is not None

    def _measure(self, model: Any) -> dict[str, Any]:
        batch_size = self.recipe.reading.batch_size
        skills = {name: self.skills.test_rows(name).batches(batch_size) for name in self.skills.test}
        return evaluate({"": model}, skills).to_dict()[""]

    def _measure_folder(self, name: str) -> dict[str, Any]:
        return self._measure(self.models.adapted(str(self.folder / name)))

    def _measure_adapter(self) -> dict[str, Any]:
        return self._measure_folder(ADAPTER)

    def _batches(self, names: Iterable[str], train: Train) -> Iterable[Any]:
        return self.skills.training_rows(names).batches(train.micro_batch_size, seed=self.recipe.seed)

    def _copy_start(self) -> None:
        with new_folder(self.folder / ADAPTER, overwrite=True) as folder:
            shutil.copytree(self.folder / START, folder, dirs_exist_ok=True)

    def _paths(self) -> dict[str, Path]:
        names = {
            "fitted": FITTED,
            "scores": SCORES,
            "mask": MASK,
            "adapter": ADAPTER,
            "merged": MERGED,
            "lora": LORA,
            "evaluation": "evaluation.json",
            "record": RECORD,
        }
        return {what: self.folder / name for what, name in names.items() if (self.folder / name).exists()}


def _without_norms(mask: ChannelMask, base: nn.Module) -> ChannelMask:
    """The channels that a LoRA adapter can hold."""
    names = [name for name in mask if not kind_of(base.get_submodule(name)).is_norm]
    return ChannelMask({name: mask[name] for name in names}, {name: mask.num_channels[name] for name in names})


def _states(recipe: Recipe) -> dict[str, Any]:
    """What tells whether models and examples are still those of an earlier run."""
    skills = [*recipe.abilities.values(), *recipe.keep.values(), *recipe.untouched.values()]
    names = {recipe.base, *recipe.donors(), *(skill.train for skill in skills), *(skill.test for skill in skills)}
    return {name: _state(Path(name)) for name in sorted(name for name in names if name is not None)}


def _state(path: Path) -> list[Any]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
