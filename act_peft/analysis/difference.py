"""The difference between two checkpoints, from their files alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from act_peft.analysis.groups import Grouping, groups_of
from act_peft.analysis.tables import Table, percent
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.parameters import Parameters
from act_peft.disk.skeleton import build_skeleton, load_config
from act_peft.transfer.lineage import RELATED, model_types
from act_peft.transfer.parameters import vocabulary_parameters

_ELEMENTS = 1 << 24  # of a parameter that are in memory at the same time
# What a transfer is sensitive to, or what shows at first sight that two models are different.
_SETTINGS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
    "hidden_act",
    "sliding_window",
)


@dataclass(frozen=True)
class GroupDifference:
    """Some parameters of two checkpoints, the values that both have.

    Attributes:
        parameters: number of parameters (tensors).
        changed: number of those that differ anywhere.
        values: number of values.
        base_squares: sum of the squares of the base's values.
        donor_squares: the same of the donor's.
        squares: sum of the squares of the differences.
        product: sum of the products of both.
    """

    parameters: int
    changed: int
    values: int
    base_squares: float
    donor_squares: float
    squares: float
    product: float

    def __add__(self, other: GroupDifference) -> GroupDifference:
        return GroupDifference(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def relative(self) -> float:
        """Norm of the difference / norm of the base; infinite where the base is 0 and the donor is not."""
        if not self.base_squares:
            return math.inf if self.squares else 0.0
        return math.sqrt(self.squares / self.base_squares)

    @property
    def cosine(self) -> float:
        """Cosine of the two; 0 where one of them is 0."""
        both = math.sqrt(self.base_squares * self.donor_squares)
        return self.product / both if both else 0.0


@dataclass(frozen=True)
class CheckpointDifference(Table):
    """What a donor's checkpoint has that its base's has not; `print` shows it.

    Attributes:
        whole: all parameters that both have.
        matrices: those with two axes; their cosine says whether the models are relatives.
        kinds: kind of module -> its parameters, the most changed first.
        layers: layer -> its parameters, in the model's order.
        settings: setting of the configuration -> values of base and donor, where they differ.
        tied: whether input and output embeddings are tied, in base and donor.
        tokens: rows of the token embedding in base and donor; None if it is not known.
        only_base: parameters that only the base has, or with a different shape.
        only_donor: parameters that only the donor has.
    """

    whole: GroupDifference
    matrices: GroupDifference
    kinds: Mapping[str, GroupDifference]
    layers: Mapping[str, GroupDifference]
    settings: Mapping[str, tuple[Any, Any]]
    tied: tuple[bool, bool]
    tokens: tuple[int, int] | None
    only_base: tuple[str, ...]
    only_donor: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Whether the two look like relatives."""
        if not self.whole.parameters:
            return "they have no parameter in common: they are no relatives"
        if not self.whole.changed:
            return "all parameters that both have are equal: it is the same model"
        cosine = f"cosine of the weights {self.matrices.cosine:.4f}"
        if self.matrices.cosine >= RELATED:
            return f"they look like relatives ({cosine})"
        return f"they do not look like relatives ({cosine}): a transfer between them makes no sense"

    @property
    def title(self) -> str:
        """What was found, in one line."""
        changed = f"{self.whole.changed} of {self.whole.parameters} parameters differ"
        return f"{changed}, by {percent(self.whole.relative)} of the base's norm; {self.verdict}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Settings, tokens and parameters that differ."""
        notes = [
            f"{name}: {mine} in the base, {theirs} in the donor" for name, (mine, theirs) in self.settings.items()
        ]
        if self.tokens is not None and self.tokens[0] != self.tokens[1]:
            more = self.tokens[1] - self.tokens[0]
            notes.append(f"tokens: the donor has {abs(more)} {'more' if more > 0 else 'fewer'} ({self.tokens[1]})")
        words = ["tied" if tied else "not tied" for tied in self.tied]
        tied = words[0] if words[0] == words[1] else f"{words[0]} in the base, {words[1]} in the donor"
        notes.append(f"input and output embeddings: {tied}")
        for where, names in (("the base", self.only_base), ("the donor", self.only_donor)):
            if names:
                notes.append(f"only in {where}, or of a different shape: {_some(names)}")
        return tuple(notes)

    def records(self) -> list[dict[str, Any]]:
        """One row for all, then one for each kind and each layer."""
        return [
            {
                "parameters of": name,
                "changed": f"{group.changed} of {group.parameters}",
                "values": group.values,
                "relative size": percent(group.relative) if math.isfinite(group.relative) else "base is 0",
                "share of the change": group.squares / self.whole.squares if self.whole.squares else 0.0,
            }
            for name, group in [("all", self.whole), *self.kinds.items(), *self.layers.items()]
        ]


def compare_checkpoints(
    base: str | os.PathLike[str], donor: str | os.PathLike[str], *, show_progress: bool = True
) -> CheckpointDifference:
    """Compare two checkpoints on disk, without building either model.

    Parameters are matched by the base's names, as in a transfer. Of vocabularies of different size the common rows are
    compared. A few rows are in memory at a time.

    Args:
        base: folder or Hub id of a checkpoint in safetensors.
        donor: the same of the other model.
        show_progress: show a progress bar if the error stream is a terminal.

    Raises:
        ActValueError: a checkpoint is missing, damaged, pickled, or of an architecture that transformers does not
            know.

    Example:
        >>> from act_peft.analysis import compare_checkpoints
        >>> print(compare_checkpoints(BASE, DONOR, show_progress=False).verdict)  # doctest: +ELLIPSIS
        they look like relatives (cosine of the weights 0.9...)
    """
    with Checkpoint.open(base) as first, Checkpoint.open(donor) as second:
        configs = load_config(first), load_config(second)
        skeletons = [build_skeleton(*pair) for pair in zip(configs, (first, second), strict=True)]
        names = [name for name, _ in skeletons[0].named_parameters(remove_duplicate=False)]
        mine = Parameters(first, names)
        shapes = mine.shapes()
        theirs = Parameters(
            second,
            names,
            fits=lambda name, shape: tuple(shape) == shapes.get(name),
            model_types=model_types(configs[0]),
        )
        vocabulary = vocabulary_parameters(skeletons[0])

        def is_common(name: str) -> bool:
            if name not in mine or name not in theirs:
                return False
            first = 1 if name in vocabulary else 0
            return mine.shape(name)[first:] == theirs.shape(name)[first:]

        fitting = [name for name in names if is_common(name)]
        common = _once(fitting, *skeletons)
        found = {
            name: _difference(mine, theirs, name)
            for name in tqdm(common, desc="diff", unit="parameter", disable=None if show_progress else True)
        }
        only_base = tuple(name for name in names if name in mine and name not in fitting)
        only_donor = tuple(name for name in theirs.shapes() if name not in mine)
        tokens = [_tokens(skeleton) for skeleton in skeletons]
        matrices = [found[name] for name in common if len(mine.shape(name)) == 2]
    texts = [config.get_text_config() for config in configs]
    nothing = GroupDifference(0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    modules = {name: name.rpartition(".")[0] for name in found}
    kinds, layers = (_pooled(found, modules, grouping) for grouping in (Grouping.KIND, Grouping.LAYER))
    values = {name: tuple(_setting(text, name) for text in texts) for name in _SETTINGS}
    return CheckpointDifference(
        whole=sum(found.values(), nothing),
        matrices=sum(matrices, nothing),
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1].relative)),
        layers=layers,
        settings={name: (a, b) for name, (a, b) in values.items() if a != b},
        tied=(bool(_setting(texts[0], "tie_word_embeddings")), bool(_setting(texts[1], "tie_word_embeddings"))),
        tokens=None if tokens[0] is None or tokens[1] is None else (tokens[0], tokens[1]),
        only_base=only_base,
        only_donor=only_donor,
    )


def _difference(mine: Parameters, theirs: Parameters, name: str) -> GroupDifference:
    shape = mine.shape(name)
    count = min(shape[0], theirs.shape(name)[0])
    rows = max(_ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    sums = torch.zeros(4, dtype=torch.float64)
    changed = False
    for start in range(0, count, rows):
        index = torch.arange(start, min(start + rows, count))
        a, b = (source.rows(name, index).to(torch.float64) for source in (mine, theirs))
        difference = b - a
        changed = changed or bool(difference.any())
        sums += torch.stack([a.square().sum(), b.square().sum(), difference.square().sum(), (a * b).sum()])
    return GroupDifference(1, int(changed), count * math.prod(shape[1:]), *sums.tolist())


def _once(names: list[str], base: Any, donor: Any) -> list[str]:
    """The names without those that are tied to an earlier one in both models."""
    owners = [
        {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        for model in (base, donor)
    ]
    first = {tuple(owner.get(name) for owner in owners): name for name in reversed(names)}
    return [name for name in names if name in set(first.values())]


def _pooled(
    found: Mapping[str, GroupDifference], modules: Mapping[str, str], grouping: Grouping
) -> dict[str, GroupDifference]:
    groups = groups_of(dict.fromkeys(modules.values()), grouping)
    pooled: dict[str, GroupDifference] = {}
    for name, difference in found.items():
        group = groups[modules[name]]
        pooled[group] = pooled[group] + difference if group in pooled else difference
    return pooled


def _setting(config: Any, name: str) -> Any:
    if name == "rope_theta":
        parameters = getattr(config, "rope_parameters", None) or {}
        return parameters.get("rope_theta", getattr(config, "rope_theta", None))
    return getattr(config, name, None)


def _tokens(skeleton: Any) -> int | None:
    try:
        weight = getattr(skeleton.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
