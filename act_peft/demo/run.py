"""The demo: a base that forgot Spanish gets it back from a donor, on ordinary checkpoint folders.

Everything goes through the public interface, as in a user's script: fit, select, fine-tune with the base as teacher,
save, load, merge. Two controls do the same fine-tune without the fit, and on random channels. Interpolation of all
weights and the paper's own recipe stand beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from act_peft.adapter.config import ActConfig
from act_peft.channels.masks import ChannelMask
from act_peft.checks import finite_number, whole_number
from act_peft.demo.family import BASE, DONOR, encode
from act_peft.demo.task import Row, Split, accuracy, rows
from act_peft.demo.words import Language
from act_peft.disk.atomic import new_folder
from act_peft.errors import ActError, ActValueError
from act_peft.fitting import FittedTransfer, fit
from act_peft.interrupts import scratch_folder
from act_peft.localization import localize
from act_peft.plots import check_matplotlib, draw_demo, save_figure
from act_peft.recipes.steps import RECORD, Report, Steps
from act_peft.recipes.surroundings import offline, one_thread, quiet
from act_peft.training.keep import KeepCallback

ABILITY, KEPT, UNTOUCHED = Language.SPANISH, Language.GERMAN, Language.ENGLISH
_LABELS = {
    ABILITY: "Spanish\n(ability to recover)",
    KEPT: "German\n(skill to keep)",
    UNTOUCHED: "English\n(not trained again)",
}
_RECIPE = "fitted, then fine-tuned"
MERGED_TOLERANCE = 1e-3  # logits are around 10; a merged weight is rounded once more than the adapter's sum

Accuracies = dict[str, float]  # language -> accuracy


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; the defaults were chosen on validation problems.

    Attributes:
        seed: order of the examples, and the random channels of a control.
        density: share of the channels of every module that is selected, above 0 and at most 1.
        keep_weight: μ of the fit, how much a change on the skill to keep counts.
        examples: training problems in each of the two languages, at most 4,050.
        steps: optimizer steps of a fine-tune.
        batch_size: examples in a step.
        keep_share: share of the examples of the skill to keep, with the base as teacher, in each step.
        learning_rate: the first learning rate; it falls linearly to zero.
        interpolation_scale: the share of the donor's difference that interpolation adds to all weights.
        paper_density: share of the channels of every module that the paper's recipe selects.
        transfer_scale: λ of the paper's recipe.
        paper_learning_rate: the first learning rate of the paper's fine-tune.
        problems: test problems in each language, at most 500.
    """

    seed: int = 0
    density: float = 0.5
    keep_weight: float = 3.0
    examples: int = 300
    steps: int = 75
    batch_size: int = 64
    keep_share: float = 0.75
    learning_rate: float = 5e-4
    interpolation_scale: float = 0.2
    paper_density: float = 0.2
    transfer_scale: float = 0.3
    paper_learning_rate: float = 2e-3
    problems: int = 500

    def __post_init__(self) -> None:
        finite_number(self.density, "density", above=0, most=1)
        finite_number(self.keep_weight, "keep_weight", least=0)
        finite_number(self.transfer_scale, "transfer_scale")
        whole_number(self.seed, "seed", least=0, most=2**32 - 1)


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        accuracies: row of the table -> language -> share of the test problems that is answered right.
        paths: result -> path of its file or folder.
        reused: steps that were not run, because an earlier run had done them.
        adapter_bytes: size of the adapter's tensors on disk.
        checkpoint_bytes: size of the base's tensors on disk.
    """

    accuracies: Mapping[str, Mapping[str, float]]
    paths: Mapping[str, Path]
    reused: Sequence[str]
    adapter_bytes: int
    checkpoint_bytes: int


def run_demo(
    output_dir: str | os.PathLike[str],
    settings: DemoSettings | None = None,
    *,
    report: Report = lambda line: None,
    overwrite: bool = False,
) -> DemoResult:
    """Run the whole method on the shipped base and donor, on the CPU and without a network.

    A step is reused if the folder holds its files, unchanged, from a run with the same settings and versions.

    Args:
        output_dir: a folder of an earlier demo, an empty one, or a new one.
        settings: the settings.
        report: called with one line when a step is done.
        overwrite: do every step again.

    Returns:
        Accuracies, sizes and paths.

    Raises:
        ActError: matplotlib is missing, or a check of the saved or merged adapter fails.
        ActValueError: the folder holds something else.
    """
    check_matplotlib()
    with one_thread(), offline(), quiet():
        return _Demo(Path(output_dir), settings or DemoSettings(), report, overwrite).run()


class _Demo:
    """One run: the steps in their order, and the record for later runs."""

    def __init__(self, output: Path, settings: DemoSettings, report: Report, overwrite: bool) -> None:
        self.output, self.settings, self.report = output, settings, report
        self.steps = Steps(output, report, overwrite, owner="a demo")

    def run(self) -> DemoResult:
        s = self.settings
        started = time.perf_counter()
        run_step = self.steps.run
        run_step("copy the two models", {}, ("base", "donor"), self._copy_models)
        problems = {"problems": s.problems}
        accuracies = dict(run_step("measure base and donor", problems, (), self._measure_originals))
        data = {"examples": s.examples, "batch_size": s.batch_size, "seed": s.seed}
        fitted = {**data, **problems, "keep_weight": s.keep_weight}
        accuracies["fitted"] = run_step("fit", fitted, ("fitted.safetensors",), self._fit)
        gains = FittedTransfer.load(self.output / "fitted.safetensors").gains
        mask = gains.top(s.density, scope="module")
        if not mask.num_selected:
            raise ActValueError(f"density: got {s.density}, expected a share that selects at least one channel")
        mask.save(self.output / "mask.safetensors")
        self.report(f"select the channels: {mask}")
        tuned = {**fitted, "density": s.density, "steps": s.steps, "learning_rate": s.learning_rate}
        tuned |= {"keep_share": s.keep_share}
        accuracies[_RECIPE] = run_step(
            "fine-tune, save and reload", tuned, ("adapter",), lambda: self._fine_tune(mask)
        )
        run_step("merge, save and reload", tuned, ("merged",), self._merge)
        controls = {
            "control: no fit": lambda: self._tuned(get_peft_model(self._model("base"), _trainable(mask))),
            "control: random channels": lambda: self._tuned(self._fitted_adapter(_random_like(mask, s.seed))),
        }
        for name, control in controls.items():
            accuracies[name] = run_step(name, tuned, (), partial(self._measure_made, control))
        interpolated = {**problems, "scale": s.interpolation_scale}
        accuracies["interpolation"] = run_step("interpolation", interpolated, (), self._interpolate)
        paper = {**data, **problems, "steps": s.steps, "density": s.paper_density, "transfer_scale": s.transfer_scale}
        paper |= {"learning_rate": s.paper_learning_rate}
        accuracies["ACT as in the paper"] = run_step("ACT as in the paper", paper, (), self._paper)
        labelled = {name: {_LABELS[skill]: row[skill.value] for skill in _LABELS} for name, row in accuracies.items()}
        figure = draw_demo(
            gains,
            labelled,
            density=s.density,
            scope="module",
            title=_finding(accuracies),
            highlight=_RECIPE,
            note=f"{s.problems} test problems in each language, {s.examples} training problems in two, seed {s.seed}",
        )
        save_figure(figure, self.output / "demo.png")
        self.report(f"done in {time.perf_counter() - started:.0f} s")
        return self._result(accuracies)

    # ---------------------------------------------------------------------------------------------------- steps ---

    def _copy_models(self) -> None:
        for name, source in (("base", BASE), ("donor", DONOR)):
            with new_folder(self.output / name, overwrite=True) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)

    def _measure_originals(self) -> dict[str, Accuracies]:
        return {name: self._measure(self._model(name)) for name in ("base", "donor")}

    def _measure(self, model: nn.Module) -> Accuracies:
        return _measure(model.eval(), self.tokenizer, self.settings)

    def _measure_made(self, make: Callable[[], nn.Module]) -> Accuracies:
        return self._measure(make())

    def _fit(self) -> Accuracies:
        base = self._model("base")
        ability, kept = (self._batches(skill) for skill in (ABILITY, KEPT))
        fitted = fit(base, self._model("donor"), ability, kept, keep_weight=self.settings.keep_weight)
        fitted.save(self.output / "fitted.safetensors")
        fitted.add_to_(base)
        return self._measure(base)

    def _fitted_adapter(self, mask: ChannelMask) -> PeftModel:
        """The base with an adapter that holds the fitted rows of some channels."""
        fitted = FittedTransfer.load(self.output / "fitted.safetensors")
        with scratch_folder() as folder:
            fitted.to_adapter(mask, folder / "adapter", base=self.output / "base")
            return PeftModel.from_pretrained(self._model("base"), folder / "adapter", is_trainable=True)

    def _tuned(self, model: PeftModel) -> PeftModel:
        """The model after a fine-tune of its adapter, with the base as teacher of what is kept."""
        s = self.settings
        many = round(s.keep_share * s.batch_size)
        few = s.batch_size - many
        trainer = self._trainer(model, rows(ABILITY, Split.TRAIN, count=s.examples), batch_size=few)
        # Every example counts the same.
        trainer.add_callback(KeepCallback(self._batches(KEPT, batch_size=many), weight=many / few))
        trainer.train()
        return model.eval()

    def _interpolate(self) -> Accuracies:
        base, donor = self._model("base"), self._model("donor")
        with torch.no_grad():
            for parameter, other in zip(base.parameters(), donor.parameters(), strict=True):
                parameter.lerp_(other, self.settings.interpolation_scale)
        return self._measure(base)

    def _paper(self) -> Accuracies:
        """Channels by activation, a fixed share of the donor's difference, a fine-tune on labels of both skills."""
        s = self.settings
        scores = localize(self._model("base"), self._model("donor"), self._batches(ABILITY))
        config = ActConfig(
            channels=scores.top(s.paper_density, scope="module"),
            donor=str(self.output / "donor"),
            transfer_scale=s.transfer_scale,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(self._model("base"), config)
        examples = [row for skill in (ABILITY, KEPT) for row in rows(skill, Split.TRAIN, count=s.examples)]
        self._trainer(model, examples, learning_rate=s.paper_learning_rate).train()
        return self._measure(model)

    def _fine_tune(self, mask: ChannelMask) -> Accuracies:
        model = self._tuned(self._fitted_adapter(mask))
        with new_folder(self.output / "adapter", overwrite=True) as folder:
            model.save_pretrained(folder)
        reloaded = self._reloaded_adapter()
        if not torch.equal(self._logits(reloaded), self._logits(model)):
            raise ActError(f"{self.output / 'adapter'}: answers differ after reloading, expected equal logits")
        return self._measure(reloaded)

    def _merge(self) -> dict[str, float]:
        expected = self._logits(self._reloaded_adapter())
        with new_folder(self.output / "merged", overwrite=True) as folder:
            self._reloaded_adapter().merge_and_unload().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        got = self._logits(self._model("merged"))
        difference = float((got - expected).abs().max())
        if difference > MERGED_TOLERANCE:
            raise ActError(
                f"{self.output / 'merged'}: logits differ from the adapter's by up to {difference:.1e}, "
                f"expected at most {MERGED_TOLERANCE:.0e}"
            )
        return {"largest logit difference": difference}

    # -------------------------------------------------------------------------------------------------- helpers ---

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.output / "base", trust_remote_code=False)

    def _model(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(str(self.output / name), trust_remote_code=False)

    def _reloaded_adapter(self) -> PeftModel:
        return PeftModel.from_pretrained(self._model("base"), self.output / "adapter").eval()

    def _logits(self, model: nn.Module) -> torch.Tensor:
        """Logits `[B, T, V]` of whole test sentences in all languages."""
        sentences = [r for language in Language for r in rows(language, Split.TEST, count=self.settings.problems)]
        ids, _ = encode(self.tokenizer, sentences)
        with torch.inference_mode():
            return model(input_ids=ids).logits

    def _batches(self, skill: Language, *, batch_size: int | None = None) -> Any:
        """Batches of training problems of a skill, tokenized and masked as for training."""
        problems = rows(skill, Split.TRAIN, count=self.settings.examples)
        return self._trainer(self._model("base"), problems, batch_size=batch_size).get_train_dataloader()

    def _trainer(
        self,
        model: nn.Module,
        examples: list[Row],
        *,
        batch_size: int | None = None,
        learning_rate: float | None = None,
    ) -> SFTTrainer:
        s = self.settings
        with scratch_folder() as unused:  # TRL creates the folder, although nothing is saved there
            arguments = SFTConfig(
                output_dir=str(unused),
                per_device_train_batch_size=s.batch_size if batch_size is None else batch_size,
                max_steps=s.steps,
                learning_rate=s.learning_rate if learning_rate is None else learning_rate,
                lr_scheduler_type="linear",
                seed=s.seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = SFTTrainer(
                model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=self.tokenizer
            )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_ProgressBar())
        return trainer

    def _result(self, accuracies: dict[str, Accuracies]) -> DemoResult:
        columns = (ABILITY, KEPT, UNTOUCHED)
        names = {
            "fitted": "fitted.safetensors",
            "mask": "mask.safetensors",
            "adapter": "adapter",
            "merged": "merged",
            "figures": "demo.png",
            "results": RECORD,
        }
        return DemoResult(
            accuracies={name: {c.value: row[c.value] for c in columns} for name, row in accuracies.items()},
            paths={what: self.output / name for what, name in names.items()},
            reused=tuple(self.steps.reused),
            adapter_bytes=(self.output / "adapter" / "adapter_model.safetensors").stat().st_size,
            checkpoint_bytes=(self.output / "base" / "model.safetensors").stat().st_size,
        )


def _measure(model: nn.Module, tokenizer: Any, settings: DemoSettings) -> Accuracies:
    return {
        language.value: accuracy(model, tokenizer, rows(language, Split.TEST, count=settings.problems))
        for language in (ABILITY, KEPT, UNTOUCHED)
    }


def _finding(accuracies: Mapping[str, Accuracies]) -> str:
    """What the demo shows, in one sentence."""
    before, after = accuracies["base"], accuracies[_RECIPE]
    change = {s: f"{100 * before[s.value]:.0f}% → {100 * after[s.value]:.0f}%" for s in (ABILITY, KEPT, UNTOUCHED)}
    words = [f"{skill.name.capitalize()} {text}" for skill, text in change.items()]
    return f"From the base to the repaired model: {', '.join(words)}"


def _random_like(mask: ChannelMask, seed: int) -> ChannelMask:
    """A mask with the same number of channels in every module, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    channels = {
        name: torch.randperm(count, generator=generator)[: mask[name].numel()]
        for name, count in mask.num_channels.items()
    }
    return ChannelMask.from_dict(channels, mask.num_channels)


def _trainable(mask: ChannelMask) -> ActConfig:
    return ActConfig(channels=mask, task_type="CAUSAL_LM")


class _ProgressBar(TrainerCallback):
    """A progress bar of the steps, on a terminal only; the Trainer's own bar also prints its last metrics."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="fine-tune", unit="step", leave=False, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
