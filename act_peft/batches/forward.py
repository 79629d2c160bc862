"""Loops over batches, and the forward pass of a model on one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from act_peft.errors import ActError, ActValueError
from act_peft.peft_modules import without_wrapper

Batch = Mapping[str, Any]

# Only the loss needs these.
_LOSS_KEYS = frozenset({"labels", "num_items_in_batch"})


def over_batches(
    dataloader: Iterable[Batch],
    work: Callable[[Batch], None],
    *,
    argument: str,
    show_progress: bool,
    description: str = "localize",
) -> None:
    """Call `work` on every batch.

    Args:
        dataloader: the batches.
        work: called with each batch.
        argument: name of the argument with the batches, for messages.
        show_progress: show a progress bar if the error stream is a terminal.
        description: what stands beside the bar.

    Raises:
        ActError: the error of `work`, with the number of the batch in its message.
        ActValueError: there is no batch.
    """
    number = -1
    with tqdm(dataloader, desc=description, unit="batch", disable=None if show_progress else True) as batches:
        for number, batch in enumerate(batches):
            try:
                work(batch)
            except ActError as error:
                raise type(error)(f"batch {number}: {error}") from error
    if number < 0:
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
