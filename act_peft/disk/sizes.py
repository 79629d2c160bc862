"""Numbers in a stranger's `config.json` that would have a model built without end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from act_peft.disk.checkpoint import Checkpoint
from act_peft.errors import ActValueError

_COUNTS = re.compile(r"layer|block|depth|stage|expert|head|label")  # of parts that are built one after the other
_SIZES = re.compile(r"size|dim|vocab|position|channels|features|width|kernel|embd|inner|capacity|eps")
_NAMES = ("label2id", "id2label")  # tables of the user's words
_LARGEST = 1 << 24  # of a size: no model is as wide, or reads as many tokens
_COUNTED = 4096  # parts that are built in any case
_TIMES = 8  # parameters of a model for each tensor of its checkpoint


def check_sizes(checkpoint: Checkpoint) -> None:
    """Check the numbers of a configuration before transformers reads it: it writes lists of as many entries.

    Raises:
        ActValueError: more layers, experts or the like than the checkpoint has tensors; a size that no model has.
    """
    most = max(_COUNTED, len(checkpoint.names))
    for key, number in _numbers(checkpoint.config):
        sized = _SIZES.search(key)
        if (number > _LARGEST and sized) or (number > most and not sized and _COUNTS.search(key)):
            limit = _LARGEST if sized else most
            raise ActValueError(
                f"{checkpoint.location}: config.json says {key} = {str(number)[:40]}, expected at most {limit} for a "
                f"checkpoint of {len(checkpoint.names)} tensors (the file is damaged)"
            )


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Every integer of a configuration, at any depth, with the key that it belongs to."""
    waiting = [("", config)]
    while waiting:
        key, value = waiting.pop()
        if type(value) is int:
            yield key, value
        elif isinstance(value, (list, tuple)):
            waiting += [(key, one) for one in value]
        elif hasattr(value, "items"):
            waiting += [(str(name), one) for name, one in value.items() if name not in _NAMES]


@contextmanager
def limited_parameters(checkpoint: Checkpoint) -> Iterator[None]:
    """Build a model in this block that has no more parameters than its checkpoint has tensors, or not many times more.

    Raises:
        ActValueError: inside the block, as soon as there are more.
    """
    most, count, thread = _COUNTED + _TIMES * len(checkpoint.names), 0, threading.get_ident()

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > most:
            raise ActValueError(
                f"{checkpoint.location}: config.json describes a model with more than {most} parameters, expected one "
                f"for a checkpoint of {len(checkpoint.names)} tensors (the file is damaged)"
            )

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
