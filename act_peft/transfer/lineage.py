"""Checks whether a donor is a relative of the base: architecture, vocabulary, shapes, similarity of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from act_peft.errors import ActValueError

RELATED = 0.5  # cosine of the selected weights: above 0.9 for relatives, near 0 for models with different ancestors

_SAMPLE = 1 << 16  # values of a module that are used for the cosine


def check_configs(base: Any, donor: Any) -> list[str]:
    """Compare two transformers configurations.

    Args:
        base: configuration of the base.
        donor: configuration of the donor.

    Returns:
        One sentence for each difference that does no harm.

    Raises:
        ActValueError: the architectures differ.
    """
    base_text, donor_text = base.get_text_config(), donor.get_text_config()
    name = getattr(donor, "_name_or_path", "") or "donor"
    notes = []
    if base_text.model_type != donor_text.model_type:
        if base_text is base and donor_text is donor:
            raise ActValueError(
                f"model_type: the donor's architecture is {donor_text.model_type}, the base's "
                f"{base_text.model_type} "
                f"(donor: {name}; take a relative of the base)"
            )
        # The text part of a multimodal model has a different type; the shapes say whether it is the same model.
        notes.append(f"the donor is a {donor_text.model_type}, the base a {base_text.model_type}")
    for key, read in (("rope_theta", _rope_theta), ("max_position_embeddings", _max_positions)):
        if read(base_text) != read(donor_text):
            notes.append(f"{key} is {read(donor_text)} in the donor and {read(base_text)} in the base")
    return notes


def model_types(config: Any) -> frozenset[str]:
    """The types of a configuration and of its part for text; none for a model without a configuration."""
    return frozenset() if config is None else frozenset({config.model_type, config.get_text_config().model_type})


def _rope_theta(config: Any) -> Any:
    parameters = getattr(config, "rope_parameters", None)
    theta = getattr(config, "rope_theta", None)
    return parameters.get("rope_theta", theta) if isinstance(parameters, Mapping) else theta


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

    A whole kind of module (a head, the vision part of a multimodal model) may be missing in one of the models. One
    layer of a list of layers may not.

    Args:
        base: parameter name -> shape.
        donor: the same of the donor.
        donor_name: for messages.
        needed: names that the donor must have.
        vocabulary: names whose first axis may have a different length.

    Raises:
        ActValueError: a module differs; the message has its name and both shapes.
    """
    names = {**base, **donor}
    base_modules, donor_modules = ({_unnumbered_module(name) for name in shapes} for shapes in (base, donor))

    def differs(name: str) -> bool:
        base_shape, donor_shape = base.get(name), donor.get(name)
        if base_shape is None:
            return _unnumbered_module(name) in base_modules
        if donor_shape is None:
            return name in needed or _unnumbered_module(name) in donor_modules
        first = 1 if name in vocabulary else 0
        return list(base_shape[first:]) != list(donor_shape[first:])

    differing = [name for name in names if differs(name)]
    if differing:
        name = differing[0]
        module = name.rpartition(".")[0]
        raise ActValueError(
            f"{module}: donor has {_described(donor.get(name), name)}, "
            f"the base has {_described(base.get(name), name)} "
            f"(donor: {donor_name}; {len(differing)} of {len(names)} tensors differ)"
        )


def _unnumbered_module(parameter: str) -> str:
    """The module of a parameter, without the numbers of layers."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1#", parameter).rpartition(".")[0]


def _described(shape: Sequence[int] | None, name: str) -> str:
    return f"no {name.rpartition('.')[2]}" if shape is None else f"{name.rpartition('.')[2]} {list(shape)}"


class Resemblance:
    """The cosine between selected weights of donor and base, summed over the modules. Broken weights are refused."""

    def __init__(self) -> None:
        self._dot = self._base = self._donor = 0.0

    def add_(self, name: str, base: torch.Tensor, difference: torch.Tensor) -> None:
        """Add the selected weight or bias of a module; only matrices count for the cosine.

        Args:
            name: the module, for messages.
            base: its selected values in the base, any shape.
            difference: donor minus base, of the same shape.

        Raises:
            ActValueError: a value is not finite.
        """
        # The sum is checked first because it is quicker. It also overflows if finite values are large.
        if not torch.isfinite(difference.sum()) and not torch.isfinite(difference).all():
            whose = "donor" if torch.isfinite(base).all() else "base"
            raise ActValueError(
                f"{name}: the {whose}'s selected weights hold NaN or infinity, expected finite numbers "
                f"(the {whose}'s checkpoint is broken)"
            )
        if difference.dim() == 2:
            every = -(-difference.numel() // _SAMPLE)
            base_sample, change = (t.flatten()[::every].to("cpu", torch.float32) for t in (base, difference))
            donor_sample = base_sample + change
            self._dot += float(base_sample @ donor_sample)
            self._base += float(base_sample @ base_sample)
            self._donor += float(donor_sample @ donor_sample)

    def notes(self) -> list[str]:
        """A sentence if the weights look unrelated, otherwise nothing."""
        related = math.sqrt(self._base * self._donor)
        if not related or self._dot / related >= RELATED:
            return []
        return [
            f"the selected weights have a cosine of {self._dot / related:.2f}, as if the models had no common ancestor"
        ]
