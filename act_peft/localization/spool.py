"""Scores by activations of two models that do not fit into memory together: one after the other, outputs on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from act_peft.batches.answer_tokens import find_answer_tokens
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.errors import ActTypeError, ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.comparison import BatchComparison
from act_peft.localization.settings import Run
from act_peft.localization.sums import ChannelSums
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.peft_modules import runnable
from act_peft.shards import gathering, needs_every_process

Model = nn.Module | Callable[[], nn.Module]
_CALL = "call"  # before the number of a call and the module's name, in a file


class Spool:
    """The outputs of a model at the answer tokens, one file for each batch, in a folder that is removed at the end.

    Args:
        folder: where the files lie, an existing folder with room for the outputs.
        sources: argument -> batches of this process.
        run: settings of the run.

    Raises:
        ActValueError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], sources: Mapping[str, Iterable[Batch]], run: Run) -> None:
        if not Path(folder).is_dir():
            raise ActValueError(f"spool: got {os.fspath(folder)}, expected an existing folder (create it first)")
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="localize-")
        self._run = run
        self._sources = sources
        self._batches: dict[str, list[Batch]] = {argument: [] for argument in sources}

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def write(self, model: nn.Module, candidates: Candidates) -> None:
        """Run the base on all batches and write its outputs.

        Args:
            model: the base.
            candidates: its own modules.
        """

        def keep(batch: Batch, argument: str) -> None:
            comparison = BatchComparison(candidates, find_answer_tokens(batch).at_most(self._run.max_tokens))
            with comparison.reading_base():
                forward(model, batch)
            tensors = {
                f"{_CALL}{number}.{name}": rows.cpu().contiguous()
                for name, calls in comparison.kept().items()
                for number, rows in enumerate(calls)
            }
            save_file(tensors, self._file(argument, len(self._batches[argument])))
            self._batches[argument].append(batch)

        self._over(model, self._sources, keep)

    def differences(
        self, model: nn.Module, candidates: Candidates, vocabulary: CommonVocabulary
    ) -> dict[str, ChannelSums]:
        """Run the donor on all batches and add up the differences; every file is removed when it was read.

        Args:
            model: the donor.
            candidates: the modules of both.
            vocabulary: the tokens that both know.
        """
        totals = {argument: ChannelSums(candidates.num_comparable) for argument in self._sources}
        numbers = dict.fromkeys(self._sources, 0)

        def compare(batch: Batch, argument: str) -> None:
            vocabulary.check(batch)
            tokens = find_answer_tokens(batch).at_most(self._run.max_tokens)
            comparison = BatchComparison(candidates, tokens)
            file = self._file(argument, numbers[argument])
            comparison.restore(_calls(load_file(file)))
            file.unlink()
            numbers[argument] += 1
            with comparison.reading_donor():
                forward(model, batch)
            totals[argument].add_(comparison.sums(), len(tokens))

        self._over(model, self._batches, compare)
        if self._run.together:
            for sums in totals.values():
                sums.gather_()
        return totals

    def _over(
        self, model: nn.Module, sources: Mapping[str, Iterable[Batch]], work: Callable[[Batch, str], None]
    ) -> None:
        spread = self._run.together and needs_every_process(model)
        with evaluation(model), gathering(model):
            for argument, batches in sources.items():
                over_batches(
                    batches,
                    lambda batch, argument=argument: work(batch, argument),  # type: ignore[misc]
                    argument=argument,
                    show_progress=self._run.show_progress,
                    together=self._run.together,
                    idle=partial(forward, model) if spread else None,
                )

    def _file(self, argument: str, number: int) -> Path:
        return Path(self._folder.name) / f"{argument}-{number}.safetensors"


def _calls(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Module name -> its outputs, one for each call."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key, rows in tensors.items():
        number, _, name = key.removeprefix(_CALL).partition(".")
        found.setdefault(name, {})[int(number)] = rows
    return {name: [calls[number] for number in sorted(calls)] for name, calls in found.items()}


def load(model: Model, argument: str) -> nn.Module:
    """A model, or what a function that loads it returns.

    Raises:
        ActTypeError: neither.
    """
    found: Any = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(found, nn.Module):
        raise ActTypeError(
            f"{argument}: got {type(model).__name__}, expected a torch.nn.Module, or a function without arguments "
            "that loads one (with spool: lambda: AutoModelForCausalLM.from_pretrained(...))"
        )
    return runnable(found)


def release(model: Model, loaded: nn.Module) -> None:
    """Free the memory of a model that was loaded for this run; its structure stays."""
    if not isinstance(model, nn.Module):
        loaded.to("meta")
