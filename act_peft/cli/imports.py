"""Imports of the library and of what it builds on: they take seconds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around slow imports, which begin with the library itself: it registers the method with PEFT."""
    importlib.import_module("act_peft.library")
    yield
