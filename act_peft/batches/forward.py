"""Loops over batches, and the forward pass of a model on one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from act_peft.batches.repeats import Batch, without_repeats
from act_peft.errors import ActError, ActValueError
from act_peft.peft_modules import without_wrapper
from act_peft.processes import any_process, num_processes, process_index

# Only the loss needs these.
_LOSS_KEYS = frozenset({"labels", "num_items_in_batch"})


def over_batches(
    dataloader: Iterable[Batch],
    work: Callable[[Batch], None],
    *,
    argument: str,
    show_progress: bool,
    description: str = "localize",
    together: bool = False,
    idle: Callable[[Batch], None] | None = None,
) -> None:
    """Call `work` on every batch.

    Args:
        dataloader: the batches.
        work: called with each batch.
        argument: name of the argument with the batches, for messages.
        show_progress: show a progress bar if the error stream is a terminal.
        description: what stands beside the bar.
        together: whether all processes of a distributed run go over their batches now, each over its own part. Samples
            that the dataloader gives to several of them are worked on once, and a process may have no batch.
        idle: what a process without further batches does with an old one as long as others have some: a model that is
            spread over the processes runs in all of them or in none.

    Raises:
        ActError: the error of `work`, with the number of the batch in its message.
        ActValueError: there is no batch.
    """
    number, latest = -1, None
    hidden = True if together and process_index() else (None if show_progress else True)
    source = without_repeats(dataloader) if together else dataloader
    with tqdm(source, desc=description, unit="batch", disable=hidden) as batches:
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            if idle is not None:
                if not any_process(batch is not None):
                    break
                if latest is None and any_process(batch is None):
                    raise ActValueError(
                        f"{argument}: a process has no batch, expected at least one in each of {num_processes()} "
                        "(the model is spread over them, so it runs in all or in none; take smaller batches)"
                    )
            if batch is not None:
                number, latest = number + 1, batch
                try:
                    work(batch)
                except ActError as error:
                    raise type(error)(f"batch {number}: {error}") from error
            elif idle is not None and latest is not None:
                idle(latest)
            else:
                break
    if not (any_process(number >= 0) if together else number >= 0):
        raise ActValueError(
            f"{argument}: got no batch, expected at least one (is the dataset empty, or a generator exhausted?)"
        )


def forward(model: nn.Module, batch: Batch, *, labels: torch.Tensor | None = None) -> Any:
    """Run a model on a batch, on the model's device.

    Args:
        model: the model.
        batch: its inputs. The model does not get the batch's own labels.
        labels: labels `[B, T]` for the model's loss.

    Returns:
        The model's output.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    inputs = {name: value for name, value in batch.items() if name not in _LOSS_KEYS}
    if labels is not None:
        inputs["labels"] = labels
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    if "use_cache" in inspect.signature(without_wrapper(model).forward).parameters:
        inputs.setdefault("use_cache", False)
    return model(**inputs)
