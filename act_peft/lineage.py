"""Whether a donor is a relative of the base: architecture, vocabulary, shapes, and how alike the weights are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from act_peft.errors import ActValueError, ActWarning

RELATED = 0.5  # cosine of the selected weights: relatives stay above 0.9, models of different ancestors are near 0


def check_configs(base: Any, donor: Any) -> list[str]:
    """Compare two transformers configurations.

    Args:
        base: configuration of the base.
        donor: configuration of the donor.

    Returns:
        What differs harmlessly, in words.

    Raises:
        ActValueError: another architecture or vocabulary.
    """
    mine, theirs = base.get_text_config(), donor.get_text_config()
    name = getattr(donor, "_name_or_path", "") or "donor"
    for key, what in (("model_type", "architecture"), ("vocab_size", "vocabulary size")):
        if getattr(mine, key, None) != getattr(theirs, key, None):
            raise ActValueError(
                f"{key}: the donor's {what} is {getattr(theirs, key, None)}, the base's {getattr(mine, key, None)} "
                f"(donor: {name}; take a relative of the base)"
            )
    notes = []
    for key, read in (("rope_theta", _rope_theta), ("max_position_embeddings", _max_positions)):
        if read(mine) != read(theirs):
            notes.append(f"{key} is {read(theirs)} in the donor and {read(mine)} in the base")
    return notes


def _rope_theta(config: Any) -> Any:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_theta", getattr(config, "rope_theta", None))


def _max_positions(config: Any) -> Any:
    return getattr(config, "max_position_embeddings", None)


def check_shapes(base: Mapping[str, Sequence[int]], donor: Mapping[str, Sequence[int]], *, donor_name: str) -> None:
    """Compare the shapes of all parameters.

    Args:
        base: parameter name -> shape.
        donor: the same of the donor.
        donor_name: for messages.

    Raises:
        ActValueError: naming the first module that differs and both shapes.
    """
    names = {**base, **donor}
    differing = [name for name in names if base.get(name) != donor.get(name)]
    if differing:
        name = differing[0]
        module = name.rpartition(".")[0]
        raise ActValueError(
            f"{module}: donor has {_in_words(donor.get(name), name)}, the base has {_in_words(base.get(name), name)} "
            f"(donor: {donor_name}; {len(differing)} of {len(names)} tensors differ)"
        )


def _in_words(shape: Sequence[int] | None, name: str) -> str:
    return f"no {name.rpartition('.')[2]}" if shape is None else f"{name.rpartition('.')[2]} {list(shape)}"


class Resemblance:
    """The cosine of selected weights of donor and base, summed up module by module; refuses broken weights."""

    def __init__(self) -> None:
        self._dot = self._base = self._donor = 0.0

    def add_(self, name: str, base: torch.Tensor, donor: torch.Tensor) -> None:
        """Count the selected weight or bias of a module; only matrices take part in the cosine.

        Args:
            name: the module, for messages.
            base: its selected values in the base, any shape.
            donor: the same of the donor.

        Raises:
            ActValueError: a value of the donor is not finite.
        """
        mine, theirs = (tensor.to("cpu", torch.float32).flatten() for tensor in (base, donor))
        square = float(theirs @ theirs)
        if not math.isfinite(square) and not torch.isfinite(donor).all():  # the sum is the quicker question
            raise ActValueError(
                f"{name}: the donor's selected weights hold NaN or infinity, expected finite numbers "
                "(the donor's checkpoint is broken)"
            )
        if donor.dim() == 2:
            self._dot += float(mine @ theirs)
            self._base += float(mine @ mine)
            self._donor += square

    def warn(self, notes: Sequence[str], *, stacklevel: int) -> None:
        """Say once what differs: the notes of `check_configs`, and weights that look unrelated.

        Args:
            notes: in words.
            stacklevel: as in `warnings.warn`, counted from the caller.

        Warns:
            ActWarning: if there is anything to say.
        """
        notes = list(notes)
        related = math.sqrt(self._base * self._donor)
        if related and self._dot / related < RELATED:
            notes.append(
                f"the selected weights have a cosine of {self._dot / related:.2f}, as if the models had no common "
                "ancestor"
            )
        if notes:
            warnings.warn(f"donor and base differ: {'; '.join(notes)}", ActWarning, stacklevel=stacklevel + 1)
