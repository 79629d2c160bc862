"""Figures of our callbacks in a Trainer's logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def add_to_log(figures: Mapping[str, float], *, state: Any, logs: dict[str, Any] | None) -> None:
    """Add figures to what a Trainer is about to log; to be called in a callback's `on_log`.

    Args:
        figures: name -> value.
        state: the Trainer's state, whose history has its entry already.
        logs: what the callbacks after this one see.
    """
    if logs is not None:
        logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)
