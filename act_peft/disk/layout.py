"""Where the parameters of a model lie in its checkpoint: keys, parts of tensors, ties.

The keys of a checkpoint are not the names of parameters. transformers changes them by the rules of the architecture
while it loads: it renames, it splits or joins tensors, it ties parameters, it ignores what the class does not have.
`Layout` applies the same rules to the keys alone, on a model without data.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from act_peft.disk.rules import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from act_peft.disk.sources import TensorSource
from act_peft.errors import ActValueError

# Operations that only move whole entries of the first axis. Those with an axis have to use the first one.
_MOVE_ROWS = ("Chunk", "Split", "Concatenate", "Interleave", "PermuteForRope", "Conv3dToLinear")


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that are rows of a parameter: row `rows[i]` of the tensor is row `channels[i]` of it.

    Both are int64 of the same length, `channels` ascending; both are None for a tensor that is the whole parameter.
    """

    key: str
    channels: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: its pieces, and its shape where that is not the tensor's own."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...] | None = None

    @property
    def key(self) -> str | None:
        """The key of the tensor that is the whole parameter; None if there are several pieces or parts of tensors."""
        return self.pieces[0].key if len(self.pieces) == 1 and self.pieces[0].rows is None else None


@dataclass(frozen=True)
class _Conversion:
    """A converter of transformers, and the tensors that it makes parameters of: (its pattern, key)."""

    converter: WeightConverter
    first: str
    tensors: list[tuple[str, str]]


class Layout:
    """The parameters of a model in its checkpoint.

    Args:
        model: the model that the checkpoint is of, on the meta device.
        source: the checkpoint.

    Attributes:
        model: the model.
        read: whether the model's class finds at least one of its parameters in the checkpoint.
    """

    def __init__(self, model: PreTrainedModel, source: TensorSource) -> None:
        self.model = model
        self._source = source
        self._parameters = model.state_dict()
        self._keys: dict[str, str] = {}
        self._conversions: dict[str, _Conversion] = {}
        self._places: dict[str, Place] = {}
        self._unread: dict[str, None] = {}
        self._rules = get_model_conversion_mapping(model)
        self._assign(source.names)
        self.read = bool(self._keys or self._conversions)

    def _assign(self, keys: Sequence[str]) -> None:
        """Apply the rules to all keys, in the order in which transformers does."""
        converters = {pattern: c for c in self._converters for pattern in c.source_patterns}
        found: dict[str, _Conversion] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self._renamed(key)
            if name not in self._parameters:
                self._unread[key] = None
            elif pattern is None:
                self._keys.setdefault(name, key)
            else:
                converter = converters[pattern]
                found.setdefault(name, _Conversion(converter, name, [])).tensors.append((pattern, key))
        for first, conversion in found.items():
            targets = conversion.converter.target_patterns
            for target in targets:
                self._conversions[first.replace(targets[0], target, 1)] = conversion

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """The name that transformers gives a key, and the pattern of the converter that takes it, if one does."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._parameters)
        if name not in self._parameters and key in self._parameters:
            return key, None
        return name, pattern

    @cached_property
    def _renamings(self) -> list[WeightRenaming]:
        return [rule for rule in self._rules if isinstance(rule, WeightRenaming)]

    @cached_property
    def _converters(self) -> list[WeightConverter]:
        return [rule for rule in self._rules if isinstance(rule, WeightConverter)]

    @property
    def stored(self) -> Collection[str]:
        """The names of the parameters that have a tensor, or a part of one, of their own."""
        return [*self._keys, *(name for name in self._conversions if name in self._parameters)]

    @property
    def unread(self) -> Collection[str]:
        """The keys that the model's class does not read."""
        return self._unread

    def has(self, name: str) -> bool:
        """Whether a parameter has a tensor, or a part of one, of its own."""
        return name in self._keys or (name in self._conversions and name in self._parameters)

    def keys_of(self, name: str) -> Sequence[str]:
        """The keys of the tensors that a parameter's own values are in."""
        return [self._keys[name]] if name in self._keys else [key for _, key in self._conversions[name].tensors]

    def model_type(self, prefix: str) -> str | None:
        """The type in the configuration of the innermost model around a prefix of names."""
        inside = [
            (len(name), module.config.model_type)
            for name, module in self.model.named_modules()
            if isinstance(module, PreTrainedModel) and prefix.startswith(f"{name}." if name else "")
        ]
        return max(inside)[1]

    def place(self, name: str) -> Place | None:
        """The place of a parameter's own tensor; None if there is none.

        Raises:
            ActValueError: the parameter is computed from tensors in a way that moves more than rows.
        """
        if name in self._keys:
            return Place((Piece(self._keys[name]),))
        if not self.has(name):
            return None
        if name not in self._places:
            self._places |= self._converted(self._conversions[name])
        if name not in self._places:
            conversion = self._conversions[name]
            steps = ", ".join(str(step) for step in conversion.converter.operations)
            raise ActValueError(
                f"{self._source.location}: {name} is made of {len(conversion.tensors)} tensors "
                f"({conversion.tensors[0][1]}, ...) by {steps}, expected a tensor or rows of tensors (its channels "
                "cannot be read from files: take the model in memory)"
            )
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter that has a place, computed where it is made of several tensors."""
        if name in self._keys:
            return self._source.shape(self._keys[name])
        conversion = self._conversions[name]
        probes = {key: torch.empty(self._source.shape(key), device="meta") for _, key in conversion.tensors}
        made = self._run(conversion, probes)
        return tuple(made[name].shape) if name in made else tuple(self._parameters[name].shape)

    def new_key(self, name: str) -> str:
        """The key under which a parameter without a tensor of its own is written: in the checkpoint's style."""
        key = name
        for rule in reversed(self._rules):
            if isinstance(rule, WeightRenaming) and rule.was_used():
                key = rule.reverse_transform().rename_source_key(key)[0]
        free = key not in self._source and key not in self._keys.values()
        return key if free and self._renamed(key) == (name, None) else name

    def _converted(self, conversion: _Conversion) -> dict[str, Place]:
        """The places of all parameters of a conversion: it is run on the numbers of rows in place of their values."""
        if not all(_moves_rows(step) for step in conversion.converter.operations):
            return {}
        first, probes, starts = 0, {}, []
        for _, key in conversion.tensors:
            shape = self._source.shape(key)
            numbers = torch.arange(first, first + shape[0])
            probes[key] = numbers.reshape(-1, *[1] * (len(shape) - 1))
            starts.append((key, first, first + shape[0]))
            first += shape[0]
        places = {}
        for name, numbers in self._run(conversion, probes).items():
            if numbers.numel() != len(numbers):
                continue
            numbers = numbers.flatten()
            pieces = tuple(_pieces(numbers, starts))
            whole = len(pieces) == 1 and pieces[0].rows is not None and torch.equal(numbers, torch.arange(first))
            if whole and len(starts) == 1:
                pieces = (Piece(pieces[0].key),)
            rest = {self._source.shape(piece.key)[1:] for piece in pieces}
            if len(rest) == 1:
                # A convolution of patches is a linear layer in memory: its axes after the first are one there.
                flat = torch.Size(next(iter(rest))).numel()
                wide = (flat,) if len(self._parameters[name].shape) == 2 else tuple(next(iter(rest)))
                places[name] = Place(pieces, (len(numbers), *wide))
        return places

    def _run(self, conversion: _Conversion, probes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a converter makes of stand-ins for its tensors; nothing if it fails."""
        rule = conversion.converter
        mine = copy.deepcopy(rule)
        for pattern, key in conversion.tensors:
            mine.add_tensor(conversion.first, key, pattern, probes[key])
        try:
            made = mine.convert(conversion.first, model=self.model, config=self.model.config)
        except Exception:  # a checkpoint that does not fit the rule fails anywhere inside transformers
            return {}
        whole = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {name: value for name, value in whole.items() if name in self._parameters}

    # ------------------------------------------------------------------------------------------------------ ties ---

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """Parameter -> the parameter that transformers ties it to, as the class and its configuration declare."""
        declared = self.model.get_expanded_tied_weights_keys(all_submodels=True)
        return {k: v for k, v in declared.items() if k in self._parameters and v in self._parameters}

    @cached_property
    def groups(self) -> Sequence[Sequence[str]]:
        """The parameters that are one tensor in memory, group by group: all members of a tie, however long."""
        members: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            members.setdefault(id(parameter), []).append(name)
        return [names for names in members.values() if len(names) > 1]

    def group(self, name: str) -> Sequence[str]:
        """All parameters that are one tensor with this one, itself included."""
        return next((group for group in self.groups if name in group), [name])

    def holder(self, name: str, stored: Collection[str] | None = None) -> str | None:
        """The parameter whose tensor this one gets while loading: itself if it has one; None if nobody has.

        Args:
            name: the parameter.
            stored: the parameters with tensors of their own, if not those of the checkpoint.
        """
        has = self.has if stored is None else stored.__contains__
        return next((partner for partner in self._partners(name) if has(partner)), None)

    def _partners(self, name: str) -> Iterator[str]:
        source = self.ties.get(name, name)
        yield name
        yield source
        yield from (target for target, its in self.ties.items() if its == source)
        yield from self.group(name)


def _moves_rows(step: object) -> bool:
    return type(step).__name__ in _MOVE_ROWS and getattr(step, "dim", 0) == 0


def _pieces(numbers: torch.Tensor, starts: Sequence[tuple[str, int, int]]) -> Iterator[Piece]:
    for key, first, stop in starts:
        channels = ((numbers >= first) & (numbers < stop)).nonzero().squeeze(1)
        if channels.numel():
            yield Piece(key, channels, numbers[channels] - first)
