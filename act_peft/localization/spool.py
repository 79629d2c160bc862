"""Scores by activations of two models that do not fit into memory together: one after the other, outputs on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from act_peft.localization.differences import Differences
from act_peft.localization.groups import Group
from act_peft.localization.settings import Run
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.peft_modules import runnable
from act_peft.shards import gathering, needs_every_process

Model = nn.Module | Callable[[], nn.Module]
_CALL = "call"  # before the number of a call and the module's name, in a file


class Spool:
    """The outputs of a model at the answer tokens, one file for each batch, in a folder that is removed at the end.

    Args:
        folder: where the files lie, an existing folder with room for the outputs.
        groups: the batches of this process.
        run: settings of the run.

    Raises:
        ActValueError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], groups: Sequence[Group], run: Run) -> None:
        if not Path(folder).is_dir():
            raise ActValueError(f"spool: got {os.fspath(folder)}, expected an existing folder (create it first)")
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="localize-")
        self._run = run
        self._groups = groups
        self._batches: list[list[Batch]] = [[] for _ in groups]

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

        def keep(batch: Batch, group: int) -> None:
            comparison = BatchComparison(candidates, find_answer_tokens(batch).at_most(self._run.max_tokens))
            with comparison.reading_base():
                forward(model, batch)
            tensors = {
                f"{_CALL}{number}.{name}": rows.cpu().contiguous()
                for name, calls in comparison.kept().items()
                for number, rows in enumerate(calls)
            }
            save_file(tensors, self._file(group, len(self._batches[group])))
            self._batches[group].append(batch)

        self._over(model, [group.batches for group in self._groups], keep)

    def differences(self, model: nn.Module, candidates: Candidates, vocabulary: CommonVocabulary) -> list[Differences]:
        """Run the donor on all batches and add up the differences; every file is removed when it was read.

        Args:
            model: the donor.
            candidates: the modules of both.
            vocabulary: the tokens that both know.

        Returns:
            The sums of each group.
        """
        totals = [Differences(candidates) for _ in self._groups]
        numbers = [0 for _ in self._groups]

        def compare(batch: Batch, group: int) -> None:
            vocabulary.check(batch)
            tokens = find_answer_tokens(batch).at_most(self._run.max_tokens)
            comparison = BatchComparison(candidates, tokens)
            file = self._file(group, numbers[group])
            comparison.restore(_calls(load_file(file)))
            file.unlink()
            numbers[group] += 1
            with comparison.reading_donor():
                forward(model, batch)
            totals[group].add_(comparison.sums(), tokens.per_sample)

        self._over(model, self._batches, compare)
        if self._run.together:
            for sums in totals:
                sums.gather_()
        return totals

    def _over(self, model: nn.Module, sources: Sequence[Iterable[Batch]], work: Callable[[Batch, int], None]) -> None:
        spread = self._run.together and needs_every_process(model)
        with evaluation(model), gathering(model):
            for number, (group, batches) in enumerate(zip(self._groups, sources, strict=True)):
                over_batches(
                    batches,
                    lambda batch, number=number: work(batch, number),  # type: ignore[misc]
                    argument=group.argument,
                    show_progress=self._run.show_progress,
                    together=self._run.together,
                    idle=partial(forward, model) if spread else None,
                )

    def _file(self, group: int, number: int) -> Path:
        return Path(self._folder.name) / f"{group}-{number}.safetensors"


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
