"""Imports of the library and of what it builds on: they take seconds."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")  # they log about optional parts when imported


@contextmanager
def importing() -> Iterator[None]:
    """Around slow imports, which begin with the library itself: it registers the method with PEFT."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    importlib.import_module("act_peft.library")
    yield
