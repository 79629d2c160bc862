"""Whether a donor is a relative of the base: architecture, vocabulary, shapes, and how alike the weights are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from act_peft.errors import ActValueError

RELATED = 0.5  # cosine of the selected weights: relatives stay above 0.9, models of different ancestors are near 0

_SAMPLE = 1 << 16  # values of a module that the cosine looks at


def check_configs(base: Any, donor: Any) -> list[str]:
    """Compare two transformers configurations.

    Args:
        base: configuration of the base.
        donor: configuration of the donor.

    Returns:
        What differs harmlessly, in words.

    Raises:
        ActValueError: another architecture.
    """
    mine, theirs = base.get_text_config(), donor.get_text_config()
    name = getattr(donor, "_name_or_path", "") or "donor"
    notes = []
    if mine.model_type != theirs.model_type:
        if mine is base and theirs is donor:
            raise ActValueError(
                f"model_type: the donor's architecture is {theirs.model_type}, the base's {mine.model_type} "
                f"(donor: {name}; take a relative of the base)"
            )
        # The text part of a multimodal model has a type of its own; the shapes tell whether it is the same model.
        notes.append(f"the donor is a {theirs.model_type}, the base a {mine.model_type}")
    for key, read in (("rope_theta", _rope_theta), ("max_position_embeddings", _max_positions)):
        if read(mine) != read(theirs):
            notes.append(f"{key} is {read(theirs)} in the donor and {read(mine)} in the base")
    return notes


def _rope_theta(config: Any) -> Any:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_theta", getattr(config, "rope_theta", None))


def _max_positions(config: Any) -> Any:
    return getattr(config, "max_position_embeddings", None)


def check_shapes(
    base: Mapping[str, Sequence[int]],
    donor: Mapping[str, Sequence[int]],
    *,
    donor_name: str,
    needed: Collection[str] = (),
    vocabulary: Collection[str] = (),
) -> None:
    """Compare the shapes of all parameters.

    A module that has no counterpart of any number (a head, the parts of a multimodal model that see) may be missing on
    either side; a layer of a list of layers may not.

    Args:
        base: parameter name -> shape.
        donor: the same of the donor.
        donor_name: for messages.
        needed: names that the donor must have.
        vocabulary: names whose first axis may have another length.

    Raises:
        ActValueError: naming the first module that differs and both shapes.
    """
    names = {**base, **donor}
    base_modules, donor_modules = ({_unnumbered_module(name) for name in shapes} for shapes in (base, donor))

    def differs(name: str) -> bool:
        mine, theirs = base.get(name), donor.get(name)
        if mine is None:
            return _unnumbered_module(name) in base_modules
        if theirs is None:
            return name in needed or _unnumbered_module(name) in donor_modules
        return list(mine if name not in vocabulary else mine[1:]) != list(
            theirs if name not in vocabulary else theirs[1:]
        )

    differing = [name for name in names if differs(name)]
    if differing:
        name = differing[0]
        module = name.rpartition(".")[0]
        raise ActValueError(
            f"{module}: donor has {_in_words(donor.get(name), name)}, the base has {_in_words(base.get(name), name)} "
            f"(donor: {donor_name}; {len(differing)} of {len(names)} tensors differ)"
        )


def _unnumbered_module(parameter: str) -> str:
    """The module of a parameter, without the numbers of layers."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1#", parameter).rpartition(".")[0]


def _in_words(shape: Sequence[int] | None, name: str) -> str:
    return f"no {name.rpartition('.')[2]}" if shape is None else f"{name.rpartition('.')[2]} {list(shape)}"


class Resemblance:
    """The cosine of selected weights of donor and base, summed up module by module; refuses broken weights."""

    def __init__(self) -> None:
        self._dot = self._base = self._donor = 0.0

    def add_(self, name: str, base: torch.Tensor, difference: torch.Tensor) -> None:
        """Count the selected weight or bias of a module; only matrices take part in the cosine.

        Args:
            name: the module, for messages.
            base: its selected values in the base, any shape.
            difference: donor minus base, of the same shape.

        Raises:
            ActValueError: a value is not finite.
        """
        # A sum is the quicker question; it also overflows where finite values are large.
        if not torch.isfinite(difference.sum()) and not torch.isfinite(difference).all():
            whose = "donor" if torch.isfinite(base).all() else "base"
            raise ActValueError(
                f"{name}: the {whose}'s selected weights hold NaN or infinity, expected finite numbers "
                f"(the {whose}'s checkpoint is broken)"
            )
        if difference.dim() == 2:
            every = -(-difference.numel() // _SAMPLE)
            mine, change = (tensor.flatten()[::every].to("cpu", torch.float32) for tensor in (base, difference))
            theirs = mine + change
            self._dot += float(mine @ theirs)
            self._base += float(mine @ mine)
            self._donor += float(theirs @ theirs)

    def notes(self) -> list[str]:
        """What there is to say of the cosine, in words: nothing, or that the weights look unrelated."""
        related = math.sqrt(self._base * self._donor)
        if not related or self._dot / related >= RELATED:
            return []
        return [
            f"the selected weights have a cosine of {self._dot / related:.2f}, as if the models had no common ancestor"
        ]
