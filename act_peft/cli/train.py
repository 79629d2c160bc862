"""`act-peft train`: the short fine-tune of an adapter."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from act_peft.cli.examples import ExampleReader, add_examples, device_of
from act_peft.cli.files import add_output
from act_peft.cli.imports import importing

SUMMARY = "Fine-tune an adapter with TRL, with the base as teacher of what is to be kept."
EXAMPLE = "act-peft train --base org/base --adapter fitted --dataset ability.jsonl --output out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model under the adapter: folder or Hub id")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--adapter", metavar="DIR", help="only this, --mask or --lora-rank: train it further: folder or Hub id"
    )
    start.add_argument(
        "--mask", type=Path, help="only in place of --adapter: train these channels: file from `act-peft select`"
    )
    start.add_argument(
        "--lora-rank", type=int, metavar="RANK", help="only in place of --adapter: train a new LoRA adapter"
    )
    parser.add_argument("--donor", help="with --mask: the channels start from its difference (from the base)")
    parser.add_argument(
        "--transfer-scale", type=float, default=0.3, metavar="SCALE", help="with --donor: share of it (0.3)"
    )
    parser.add_argument("--dataset", required=True, help="examples to train on in one of TRL's formats")
    parser.add_argument("--keep-dataset", nargs="+", metavar="DATASET", help="examples of what is to be kept (none)")
    parser.add_argument(
        "--keep-weight", type=float, default=3.0, metavar="WEIGHT", help="how much what is kept counts (3.0)"
    )
    parser.add_argument(
        "--teacher",
        metavar="DONOR",
        help="donor that teaches the ability beside the labels: folder or Hub id (none)",
    )
    parser.add_argument("--donor-weight", type=float, default=1.0, metavar="WEIGHT", help="how much it counts (1.0)")
    parser.add_argument(
        "--trainer",
        choices=("sft", "dpo", "distillation"),
        default="sft",
        help="dpo: examples with prompt, chosen, rejected; distillation: prompts, which the model answers and "
        "--teacher grades (sft)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (by --epochs)")
    parser.add_argument("--epochs", type=float, default=1.0, help="rounds over the examples (1.0)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, metavar="RATE", help="the first one (0.0001)")
    parser.add_argument("--update-size", type=int, default=16, metavar="COUNT", help="examples in a step (16)")
    parser.add_argument("--report-to", nargs="+", metavar="TRACKER", help="trackio, wandb, tensorboard (none)")
    add_examples(parser, samples=100_000, batch_size=4)
    add_output(parser, what="folder of the adapter")
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Train, and print what was written."""
    if arguments.donor is not None and arguments.mask is None:
        arguments.refuse("argument --donor: expected together with --mask (see --teacher)")
    if arguments.trainer == "distillation" and arguments.teacher is None:
        arguments.refuse("the following arguments are required with --trainer distillation: --teacher")
    if arguments.update_size % arguments.batch_size:
        arguments.refuse(
            f"argument --update-size: got {arguments.update_size}, expected a multiple of --batch-size "
            f"({arguments.batch_size})"
        )
    with importing():
        from accelerate import PartialState
        from pydantic import ValidationError

        from act_peft.disk.folders import check_output
        from act_peft.recipes.schema import Train
        from act_peft.recipes.surroundings import quiet

    try:
        settings = Train(
            trainer=arguments.trainer,
            steps=arguments.steps,
            epochs=arguments.epochs,
            batch_size=arguments.update_size,
            micro_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            keep_weight=arguments.keep_weight if arguments.keep_dataset else 0,
            donor_weight=arguments.donor_weight if arguments.teacher is not None else 0,
            report_to=arguments.report_to or [],
        )
    except ValidationError as error:
        found = error.errors()[0]
        name = str(found["loc"][0]).replace("_", "-")
        arguments.refuse(f"argument --{name}: got {found['input']!r}, {found['msg'][0].lower()}{found['msg'][1:]}")
    check_output(arguments.output, [], overwrite=arguments.overwrite)
    arguments.device = device_of(arguments)
    with quiet():
        log = _train(arguments, settings)
    if PartialState().is_main_process:
        losses = [entry["loss"] for entry in log if "loss" in entry]
        if losses:
            print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
        print(f"{arguments.output}: adapter")


def _train(arguments: argparse.Namespace, settings: Any) -> list[dict[str, Any]]:
    """Train and save; the trainer's log."""
    from accelerate import PartialState

    from act_peft import DonorCallback, KeepCallback
    from act_peft.data.models import load_tokenizer
    from act_peft.data.tokenizing import joined
    from act_peft.recipes.training import TrainingRun, fine_tune, save_adapter

    reader = ExampleReader(arguments)
    found = reader.load(arguments.dataset)
    kept = [(name, reader.load(name)) for name in arguments.keep_dataset or []]
    model = _model(arguments, reader)
    rows = reader.rows(found, model, name=arguments.dataset) if settings.trainer != "distillation" else None
    size, seed = settings.micro_batch_size, arguments.seed + PartialState().process_index
    many = settings.batch_size // size
    teachers: list[Any] = []
    if kept:
        batches = joined([reader.rows(one, model, name=name) for name, one in kept]).batches(size, seed=seed)
        teachers.append(KeepCallback(batches, weight=settings.keep_weight, batches_per_step=many))
    donor = None if arguments.teacher is None else reader.donor(arguments.teacher)
    if donor is not None and rows is not None:
        batches = rows.batches(size, seed=seed)
        teachers.append(DonorCallback(donor, batches, weight=settings.donor_weight, batches_per_step=many))
    training = TrainingRun(
        examples=rows.rows if rows is not None and settings.trainer == "sft" else found,
        tokenizer=load_tokenizer(arguments.base),
        folder=arguments.output.with_name(f"{arguments.output.name}.training"),
        teachers=teachers,
        seed=arguments.seed,
        device=arguments.device,
        max_length=arguments.max_length,
        donor=_whole(donor, arguments, reader) if settings.trainer == "distillation" else None,
    )
    log = fine_tune(model, settings, training, lambda line: print(line, file=sys.stderr))
    save_adapter(model, arguments.output, overwrite=arguments.overwrite)
    shutil.rmtree(training.folder, ignore_errors=True)
    return log


def _whole(donor: Any, arguments: argparse.Namespace, reader: ExampleReader) -> Any:
    """A donor as a model that runs by itself."""
    from act_peft.data.models import load_adapter

    return load_adapter(reader.model(arguments.base), donor) if isinstance(donor, str) else donor


def _model(arguments: argparse.Namespace, reader: ExampleReader) -> Any:
    """The base with the adapter that trains."""
    import torch
    from peft import LoraConfig, get_peft_model

    from act_peft import ActConfig
    from act_peft.data.models import load_adapter

    base = reader.model(arguments.base)
    torch.manual_seed(arguments.seed)
    if arguments.adapter is not None:
        return load_adapter(base, arguments.adapter, trainable=True)
    if arguments.mask is not None:
        config = ActConfig(channels=str(arguments.mask), donor=arguments.donor, task_type="CAUSAL_LM")
        if arguments.donor is not None:
            config.transfer_scale = arguments.transfer_scale
        return get_peft_model(base, config)
    rank = arguments.lora_rank
    return get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
