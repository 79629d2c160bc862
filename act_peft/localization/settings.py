"""How `localize` runs, whatever it scores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from act_peft.channels.scores import ScoreKind
from act_peft.checks import whole_number
from act_peft.errors import ActTypeError, ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.groups import Group
from act_peft.localization.progress import Progress, Totals, digest_of_run

MAX_MEMORY = 1 << 30
EVERY = 50


@dataclass(frozen=True)
class Run:
    """Settings of a run over the data.

    Attributes:
        max_tokens: the greatest number of answer tokens of a sample that count; None for all.
        max_memory: bytes for outputs of the base that wait for the donor.
        checkpoint: file of the running sums; None for none.
        every: number of batches after which it is written.
        show_progress: show a progress bar if the error stream is a terminal.
        together: whether all processes of a distributed run take part.
    """

    max_tokens: int | None
    max_memory: int
    checkpoint: str | None
    every: int
    show_progress: bool
    together: bool = False

    def progress(
        self,
        candidates: Candidates,
        totals: Totals,
        group: Group,
        settings: tuple[Any, ...] = (),
    ) -> Progress | None:
        """The running sums on disk of one pass over the data; None if they are not wanted.

        Args:
            candidates: the compared modules.
            totals: the sums.
            group: the data. Each of several groups, and the data to keep, have a file of their own.
            settings: what else the sums depend on.
        """
        if self.checkpoint is None:
            return None
        made_from = digest_of_run(candidates, (group.argument, self.max_tokens, self.together, *settings))
        return Progress(f"{self.checkpoint}{group.suffix}", self.every, totals, made_from)


def make_run(
    kind: ScoreKind,
    *,
    max_tokens: Any,
    max_memory: Any,
    checkpoint: Any,
    every: Any,
    spool: Any,
    show_progress: bool,
) -> Run:
    """Check the settings, and refuse those that the score would ignore.

    Raises:
        ActTypeError: a setting of the wrong type.
        ActValueError: a number out of range; a setting that is not used.
    """
    reads_outputs = kind in (ScoreKind.ACTIVATION, ScoreKind.CONTRAST)
    for name, value in (("max_tokens", max_tokens), ("max_memory", max_memory), ("spool", spool)):
        if value is not None and not reads_outputs:
            raise ActValueError(
                f"{name}: got one with score={kind.value!r}, expected none (only score='activation' and "
                "score='contrast' use it)"
            )
    if checkpoint is not None and kind is ScoreKind.WEIGHT:
        raise ActValueError("checkpoint: got one with score='weight', expected none (weights are read at once)")
    if checkpoint is None and every is not None:
        raise ActValueError("every: got one without checkpoint, expected both (or neither)")
    if checkpoint is not None and spool is not None:
        raise ActValueError("checkpoint: got one together with spool, expected one of them (the spool is no result)")
    for name, path in (("checkpoint", checkpoint), ("spool", spool)):
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ActTypeError(f"{name}: got {type(path).__name__}, expected a path")
    return Run(
        max_tokens=None if max_tokens is None else whole_number(max_tokens, "max_tokens", least=1),
        max_memory=MAX_MEMORY if max_memory is None else whole_number(max_memory, "max_memory", least=1),
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        every=EVERY if every is None else whole_number(every, "every", least=1),
        show_progress=show_progress,
    )
