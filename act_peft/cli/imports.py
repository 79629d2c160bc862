"""Imports of the library and of what it builds on: they take seconds."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")  # they log about optional parts when imported


@contextmanager
def importing(*, library: bool = True) -> Iterator[None]:
    """Around slow imports, which begin with the library itself: it registers the method with PEFT.

    Without `library` they do not: what needs neither models nor PEFT starts sooner and takes less memory.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if library:
        importlib.import_module("act_peft.library")
    yield
