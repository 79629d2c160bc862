"""Did it work? Loss, token accuracy and right answers of models on held-out data, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from act_peft.batches.evaluation import evaluation
from act_peft.errors import ActTypeError, ActValueError
from act_peft.sweeps.heldout import HeldOutData, SampleSums, SkillResult
from act_peft.tables import aligned


@dataclass(frozen=True)
class Flips:
    """How many examples two models answer differently; right: every answer token is the first choice.

    Attributes:
        wrong_to_right: examples that only the second model answers right.
        right_to_wrong: examples that only the first model answers right.
    """

    wrong_to_right: int
    right_to_wrong: int


@dataclass(frozen=True)
class Evaluation:
    """What several models say to the same held-out data; `print` shows the table.

    Attributes:
        results: model -> skill -> loss and accuracy over the answer tokens. The first model is the one that the others
            are compared with.

    Example:
        >>> result = evaluate({"base": base, "donor": donor}, {"ability": batches})
        >>> Evaluation.from_dict(result.to_dict()) == result
        True
    """

    results: Mapping[str, Mapping[str, SkillResult]]

    def flips(self, model: str, skill: str) -> Flips | None:
        """The examples that a model answers differently from the first one; None where samples are not known."""
        before, after = self.results[self._first][skill].samples, self.results[model][skill].samples
        if before is None or after is None:
            return None
        was, is_now = _right(before), _right(after)
        return Flips(int((~was & is_now).sum()), int((was & ~is_now).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: with the sums of every sample, from which `from_dict` makes the same evaluation."""
        return {model: {skill: _plain(result) for skill, result in row.items()} for model, row in self.results.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Evaluation:
        """The evaluation that `to_dict` wrote."""
        return cls({model: {skill: _result(found) for skill, found in row.items()} for model, row in values.items()})

    @property
    def _first(self) -> str:
        return next(iter(self.results))

    def __str__(self) -> str:
        lines = [["", "", "examples", "tokens", "loss", "", "accuracy", "", "against " + self._first, "right", ""]]
        first = self.results[self._first]
        for skill in first:
            for model, row in self.results.items():
                result, flips = row[skill], self.flips(model, skill)
                number = None if result.samples is None else len(result.samples.tokens)
                cells = [skill if model == self._first else "", model, _text(number), _text(result.num_tokens)]
                cells += [f"{result.loss:.3f}", _error(result.loss_error)]
                cells += [f"{result.accuracy:.3f}", _error(result.accuracy_error)]
                if model == self._first:
                    right = None if result.samples is None else int(_right(result.samples).sum())
                    cells += ["", _text(right), ""]
                else:
                    rise, error = result.rise_over(first[skill])
                    change = "" if flips is None else f"+{flips.wrong_to_right} -{flips.right_to_wrong}"
                    right = None if result.samples is None else int(_right(result.samples).sum())
                    cells += [f"{rise:+.3f} {_error(error)}".rstrip(), _text(right), change]
                lines.append(cells)
        return "\n".join(
            [
                "loss in nats per answer token and token accuracy, with standard errors; right: examples with every "
                "answer token right",
                "",
                *aligned(lines, left=(0, 1)),
            ]
        )


def evaluate(
    models: Mapping[str, nn.Module],
    skills: Mapping[str, Iterable[Mapping[str, Any]]],
) -> Evaluation:
    """Measure models on held-out data of several skills.

    Args:
        models: name -> language model; the others are compared with the first one.
        skills: name -> batches (dicts) of `[B, T]` tokens; what counts are the answer tokens, as for `localize`.

    Returns:
        Loss in nats per token, token accuracy and right examples of every model and skill.

    Raises:
        ActTypeError: something else than models, or than dicts of batches.
        ActValueError: no model or no skill; a skill without a batch, or a batch without a counted token.

    Example:
        >>> result = evaluate({"base": base, "donor": donor}, {"ability": batches})
        >>> result.results["donor"]["ability"].num_tokens
        28
        >>> print(result)
    """
    for name, given, what in (("models", models, "model"), ("skills", skills, "batches")):
        if not isinstance(given, Mapping):
            raise ActTypeError(f"{name}: got {type(given).__name__}, expected a dict from a name to the {what}")
        if not given:
            raise ActValueError(f"{name}: got none, expected at least one")
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise ActTypeError(f"models: {name!r}: got {type(model).__name__}, expected a torch.nn.Module")
    data = {name: HeldOutData(batches, argument=f"skills: {name!r}") for name, batches in skills.items()}
    found = {}
    for name, model in models.items():
        with evaluation(model):
            found[name] = {skill: held_out.measure(model) for skill, held_out in data.items()}
    return Evaluation(found)


def _right(samples: SampleSums) -> torch.Tensor:
    return samples.hits == samples.tokens


def _plain(result: SkillResult) -> dict[str, Any]:
    found: dict[str, Any] = {"loss": result.loss, "accuracy": result.accuracy, "num_tokens": result.num_tokens}
    found |= {"loss_error": result.loss_error, "accuracy_error": result.accuracy_error}
    if result.samples is not None:
        sums = ("losses", "hits", "tokens")
        found["samples"] = {name: getattr(result.samples, name).tolist() for name in sums}
    return found


def _result(values: Mapping[str, Any]) -> SkillResult:
    sums = values.get("samples")
    samples = None
    if sums is not None:
        samples = SampleSums(*(torch.tensor(sums[name], dtype=torch.float64) for name in ("losses", "hits", "tokens")))
    return SkillResult(values["loss"], values["accuracy"], samples)


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def _error(value: float | None) -> str:
    return "" if value is None else f"± {value:.3f}"
