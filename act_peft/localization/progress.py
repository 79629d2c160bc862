"""Running sums on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from act_peft.batches.repeats import Batch
from act_peft.channels.scores import ChannelScores
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.processes import num_processes, process_index

_SAMPLE = 16  # values of a parameter in the digest of a pair of models


class Totals(Protocol):
    """Running sums that can be stored as scores."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens summed."""

    def scores(self) -> ChannelScores:
        """The scores of the batches so far."""

    def resume_(self, scores: ChannelScores) -> None:
        """Go on from the scores of an earlier run."""


class Progress:
    """The sums of one pass over the data, written to a file of scores every few batches.

    The file is a `ChannelScores` of the batches so far. Its metadata hold their number and a digest of their content.

    Args:
        path: the file. Each process of a distributed run writes one of its own, `PATH.NUMBER-of-PROCESSES`.
        every: number of batches after which it is written.
        totals: the sums; those of an existing file are taken over.
        made_from: digest of models and settings, which have to be the same to go on.

    Raises:
        ActValueError: the file holds something else, or the sums of other models or settings.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, totals: Totals, made_from: str) -> None:
        self._path = own_file(path)
        self._every, self._totals, self._made_from = every, totals, made_from
        self._number, self._digest = 0, ""
        self._done, self._expected = 0, ""
        if self._path.exists():
            self._resume()

    def _resume(self) -> None:
        scores = ChannelScores.load(self._path)
        made_from, self._done, self._expected = ChannelScores.read_progress(self._path)
        if made_from != self._made_from:
            raise ActValueError(
                f"{self._path}: holds sums of other models or settings, expected those of this run (take another name "
                "for the checkpoint, or delete the file)"
            )
        self._totals.resume_(scores)

    def is_done(self, batch: Batch) -> bool:
        """Whether a batch, the next one of the dataloader, is in the sums already.

        Raises:
            ActValueError: the batches so far are not those of the interrupted run.
        """
        self._number += 1
        self._digest = _digest_of(self._digest, batch)
        if self._number == self._done and self._digest != self._expected:
            raise ActValueError(
                f"{self._path}: its {self._done} batches are not the first ones of this dataloader, expected the same "
                "batches in the same order (fix the order of the samples: shuffle=False, or a seed; or delete the "
                "file)"
            )
        return self._number <= self._done

    def advance(self) -> None:
        """Note that the latest batch is in the sums, and write them if it is time."""
        if (self._number - self._done) % self._every == 0:
            self.write()

    def write(self) -> None:
        """Write the sums.

        Raises:
            ActValueError: the dataloader ended before the batches that are in the sums already.
        """
        if self._number < self._done:
            raise ActValueError(
                f"{self._path}: holds {self._done} batches, the dataloader has {self._number}, expected the same data "
                "(or delete the file)"
            )
        if self._totals.num_tokens:
            self._totals.scores().save(self._path, progress=(self._made_from, self._number, self._digest))


def own_file(path: str | os.PathLike[str]) -> Path:
    """The file of this process: the path itself, or one for each process of a distributed run."""
    path = Path(path)
    size = num_processes()
    return path if size == 1 else path.with_name(f"{path.name}.{process_index()}-of-{size}")


def digest_of_run(candidates: Candidates, settings: Any) -> str:
    """Digest of the candidates' names, some values of their parameters in both models, and settings."""
    found = hashlib.sha256(repr(settings).encode())
    for modules in (candidates.base, candidates.donor):
        for name, module in modules.items():
            found.update(name.encode())
            for parameter in module.parameters():
                found.update(_some_values(parameter))
    return found.hexdigest()


def _some_values(parameter: nn.Parameter) -> bytes:
    values = parameter.detach()
    values = getattr(values, "_local_tensor", values)
    if values.device.type == "meta" or not values.numel():
        return b"none"
    flat = values.flatten()
    sample = flat[:: max(flat.numel() // _SAMPLE, 1)][:_SAMPLE]
    return bytes(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())


def _digest_of(before: str, batch: Mapping[str, Any]) -> str:
    found = hashlib.sha256(before.encode())
    for name, value in sorted(batch.items()):
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
