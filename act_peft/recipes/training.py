"""The short fine-tune of an adapter by one of TRL's trainers, with the base and the donor as teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from act_peft.disk.atomic import new_folder
from act_peft.errors import ActError, ActValueError
from act_peft.recipes.schema import Train

_PREFERENCES = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class TrainingRun:
    """What a fine-tune needs beside its settings.

    Attributes:
        examples: for `sft` tokenized rows (`input_ids`, `labels`), for `dpo` preferences, for `distillation` prompts.
        tokenizer: the model's tokenizer.
        folder: of the trainer's checkpoints, from which an interrupted run goes on.
        teachers: callbacks that teach; trackers see their figures.
        seed: of the order of the examples.
        device: `cpu` or another.
        max_length: tokens of an example, for preferences.
        donor: the model that grades, for `distillation`.
    """

    examples: Dataset
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    teachers: Sequence[TrainerCallback]
    seed: int
    device: str
    max_length: int
    donor: nn.Module | None = None


def fine_tune(
    model: PeftModel, settings: Train, run: TrainingRun, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train the adapter. A run that was interrupted goes on from its last checkpoint.

    Args:
        model: with the adapter that trains.
        settings: of the fine-tune.
        run: what else it needs.
        report: called with one line when a checkpoint is used.

    Returns:
        The trainer's log: every entry has the losses and the teachers' figures since the last one.

    Raises:
        ActValueError: examples without the columns that the trainer needs.
        ActError: `distillation` with a TRL that does not have it.
    """
    trainer = _TRAINERS[settings.trainer](model, settings, run)
    trainer.remove_callback(PrinterCallback)
    for teacher in run.teachers:  # before the trackers, which then see their figures
        trainer.callback_handler.callbacks.insert(0, teacher)
    checkpoint = _last_checkpoint(run.folder)
    if checkpoint is not None:
        report(f"fine-tune: goes on from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer.state.log_history


def _arguments(settings: Train, run: TrainingRun) -> dict[str, Any]:
    """The arguments that all trainers share."""
    on_cpu = run.device == "cpu"
    return {
        "output_dir": str(run.folder),
        "max_steps": settings.steps or -1,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
        "seed": run.seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": False,
        "dataloader_pin_memory": not on_cpu,
        "report_to": settings.report_to or "none",
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 0.25,  # of the run
        "save_total_limit": 1,
        "disable_tqdm": True,
    }


def _sft(model: PeftModel, settings: Train, run: TrainingRun) -> SFTTrainer:
    arguments = SFTConfig(**_arguments(settings, run), max_length=None)
    return SFTTrainer(model, args=arguments, train_dataset=run.examples, processing_class=run.tokenizer)


def _dpo(model: PeftModel, settings: Train, run: TrainingRun) -> DPOTrainer:
    _check_columns(run.examples, _PREFERENCES, "dpo")
    arguments = DPOConfig(**_arguments(settings, run), max_length=run.max_length)
    return DPOTrainer(model, args=arguments, train_dataset=run.examples, processing_class=run.tokenizer)


def _distillation(model: PeftModel, settings: Train, run: TrainingRun) -> Any:
    try:
        from trl import DistillationConfig, DistillationTrainer
    except ImportError as error:
        raise ActError(f"distillation: TRL here has no DistillationTrainer ({error}), expected a newer TRL") from error
    _check_columns(run.examples, ("prompt",), "distillation")
    arguments = DistillationConfig(**_arguments(settings, run), max_completion_length=settings.max_completion_length)
    return DistillationTrainer(
        model=model,
        teacher_model=run.donor,
        args=arguments,
        train_dataset=run.examples.select_columns(["prompt"]),
        processing_class=run.tokenizer,
    )


def _check_columns(examples: Dataset, needed: Sequence[str], trainer: str) -> None:
    columns = examples.column_names
    if missing := [name for name in needed if name not in columns]:
        raise ActValueError(
            f"dataset: got the columns {columns}, expected {', '.join(needed)} for {trainer} ({missing[0]} is missing)"
        )


_TRAINERS: Mapping[str, Callable[[PeftModel, Train, TrainingRun], Any]] = {
    "sft": _sft,
    "dpo": _dpo,
    "distillation": _distillation,
}


def save_adapter(model: PeftModel, folder: Path, *, overwrite: bool) -> None:
    """Save the adapter, in one of several processes alone. It appears whole or not at all.

    Raises:
        ActValueError: the folder exists and `overwrite` is not set; the disk refuses.
    """
    state = PartialState()
    if state.is_main_process:
        with new_folder(folder, overwrite=overwrite) as new:
            # Alone: `dpo` adds a reference.
            model.save_pretrained(new, selected_adapters=[model.active_adapter])
    state.wait_for_everyone()


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a trainer that is whole."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
