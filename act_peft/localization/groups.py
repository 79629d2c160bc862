"""The batches of several domains or languages, each scored by itself in one run of the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.batches.forward import Batch
from act_peft.errors import ActTypeError, ActValueError

ONLY = ""  # the name of the group if there is a single dataloader


@dataclass(frozen=True)
class Group:
    """Some batches.

    Attributes:
        batches: the batches.
        argument: the name of the argument with them, for messages.
        suffix: what follows the name of a file for these batches alone.
    """

    batches: Iterable[Batch]
    argument: str
    suffix: str = ""


Groups = Mapping[str, Group]


def groups_of(dataloader: Any) -> Groups:
    """The groups that an argument names: a dict of dataloaders, or a single one.

    Raises:
        ActTypeError: a name that is no str.
        ActValueError: an empty dict, or an empty name.
    """
    # A batch is a dict too, but of tensors; it is refused later, where batches are read.
    if not isinstance(dataloader, Mapping) or any(isinstance(value, torch.Tensor) for value in dataloader.values()):
        return {ONLY: Group(dataloader, "dataloader")}
    if not dataloader or ONLY in dataloader:
        got = "an empty name" if dataloader else "an empty dict"
        raise ActValueError(f"dataloader: got {got}, expected dataloaders by name, or a single one")
    for name in dataloader:
        if not isinstance(name, str):
            raise ActTypeError(f"dataloader: got the name {name!r:.80}, expected a str for each of the dataloaders")
    return {
        name: Group(batches, f"dataloader[{name!r}]", f".group-{number}")
        for number, (name, batches) in enumerate(dataloader.items())
    }


def group_to_keep(dataloader: Iterable[Batch] | None) -> Group | None:
    """The data to keep, if there are any."""
    return None if dataloader is None else Group(dataloader, "keep_dataloader", ".keep")
