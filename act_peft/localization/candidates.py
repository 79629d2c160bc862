"""The modules of two models that are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from act_peft.channels.kinds import ChannelKind, channel_kind, num_channels, weight_of
from act_peft.channels.names import Patterns, matches
from act_peft.errors import ActValueError
from act_peft.peft_modules import NamedModule, named_modules, without_wrapper
from act_peft.shards import full_shape

ALL_LINEAR = "all-linear"
_LINEAR = (ChannelKind.LINEAR, ChannelKind.CONV1D)


@dataclass(frozen=True)
class Candidates:
    """The compared modules of two models; the mappings have the same keys, in the base's order.

    Attributes:
        base: module name -> module of the base.
        donor: module name -> module of the donor.
        num_channels: module name -> number of channels C in the base.
        donor_channels: module name -> number of channels C in the donor. It differs from the base's only in an output
            layer, if the vocabularies differ.
        embeddings: names of the embeddings.
    """

    base: dict[str, nn.Module]
    donor: dict[str, nn.Module]
    num_channels: dict[str, int]
    donor_channels: dict[str, int]
    embeddings: frozenset[str]

    @property
    def num_comparable(self) -> dict[str, int]:
        """Module name -> number of its first channels that both models have."""
        return {name: min(count, self.donor_channels[name]) for name, count in self.num_channels.items()}

    def summary(self) -> str:
        """The modules and their numbers of channels, in a few words that are the same for the same ones."""
        digest = hashlib.sha256(repr(list(self.num_comparable.items())).encode()).hexdigest()[:8]
        return f"{sum(self.num_comparable.values())} channels in {len(self.base)} modules ({digest})"

    def padded(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Extend values of the comparable channels to `[C]` with zeros."""
        return {
            name: nn.functional.pad(values[name], (0, count - values[name].numel()))
            for name, count in self.num_channels.items()
        }


def find_candidates(
    base: nn.Module, donor: nn.Module, *, target_modules: Patterns = None, exclude_modules: Patterns = None
) -> Candidates:
    """The modules with channels, selected as in PEFT, and checked to be the same in both models.

    Args:
        base: the base.
        donor: the donor.
        target_modules: regular expression for the whole name, names or dotted suffixes, or `"all-linear"` (every
            linear and Conv1D module except the output layer); None selects every module with channels except those
            that `left_out_by_default` names.
        exclude_modules: regular expression, names or dotted suffixes to leave out.

    Raises:
        ActValueError: no module is left, or a candidate is missing in one model or has a different number of channels.
    """
    in_base = _select(base, target_modules, exclude_modules)
    in_donor = _select(donor, target_modules, exclude_modules)
    if not in_base and not in_donor:
        raise ActValueError(
            f"target_modules: got {target_modules!r} without {exclude_modules!r}, which leaves no module with "
            f"channels (the base has: {_some_names(base)})"
        )
    heads = (_output_layer(base), _output_layer(donor))
    names = list({**in_base, **in_donor})
    differing = [name for name in names if not _agree(in_base.get(name), in_donor.get(name), heads)]
    if differing:
        name = differing[0]
        raise ActValueError(
            f"{name}: donor has {_shape_text(in_donor.get(name))}, the base has {_shape_text(in_base.get(name))} "
            f"({len(differing)} of {len(names)} modules differ; take two models of the same structure, "
            "or leave these out with exclude_modules)"
        )
    return Candidates(
        base={name: module.called for name, module in in_base.items()},
        donor={name: in_donor[name].called for name in in_base},
        num_channels={name: num_channels(module.layer) for name, module in in_base.items()},
        donor_channels={name: num_channels(in_donor[name].layer) for name in in_base},
        embeddings=frozenset(n for n, m in in_base.items() if channel_kind(m.layer) is ChannelKind.EMBEDDING),
    )


def left_out_by_default(model: nn.Module) -> list[str]:
    """The modules with channels that are candidates only if `target_modules` names them, in the model's order.

    These are the output layer and every `nn.Embedding` (tokens, positions, types). The output layer is what the
    model's `get_output_embeddings` returns. For a model without this method it is the linear module that shares its
    weight with an embedding, or else the last linear module if it has as many channels as the first embedding has
    rows; or else there is none.
    """
    modules = _with_channels(model)
    head = _output_layer(model)
    return [
        name
        for name, module in modules.items()
        if channel_kind(module.layer) is ChannelKind.EMBEDDING or module.called is head
    ]


def unmatched_names(model: nn.Module, patterns: Patterns) -> list[str]:
    """The names in a list, or the regular expression, that match no module with channels (misspelt ones)."""
    if patterns is None or (isinstance(patterns, str) and patterns.lower() == ALL_LINEAR):
        return []
    names = list(_with_channels(model))
    if isinstance(patterns, str):
        return [] if any(matches(name, patterns) for name in names) else [patterns]
    return sorted(pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names))


def _with_channels(model: nn.Module) -> dict[str, NamedModule]:
    return {name: module for name, module in named_modules(model) if channel_kind(module.layer) is not None}


def _select(model: nn.Module, targets: Patterns, excluded: Patterns) -> dict[str, NamedModule]:
    modules = _with_channels(model)
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        unasked = set(left_out_by_default(model))
        modules = {name: module for name, module in modules.items() if name not in unasked}
        if targets is not None:
            modules = {name: module for name, module in modules.items() if channel_kind(module.layer) in _LINEAR}
    else:
        modules = {name: module for name, module in modules.items() if matches(name, targets)}
    return {name: module for name, module in modules.items() if not matches(name, excluded)}


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The output layer, as `left_out_by_default` defines it."""
    plain = without_wrapper(model)
    getter = getattr(plain, "get_output_embeddings", None)
    if callable(getter):
        try:
            return getter()
        except NotImplementedError:
            return None
    modules = list(_with_channels(plain).values())
    embeddings = [weight_of(m.layer) for m in modules if channel_kind(m.layer) is ChannelKind.EMBEDDING]
    linear = [module for module in modules if channel_kind(module.layer) in _LINEAR]
    for module in reversed(linear):
        if any(weight_of(module.layer) is weight for weight in embeddings):
            return module.called
    if embeddings and linear and num_channels(linear[-1].layer) == full_shape(embeddings[0])[0]:
        return linear[-1].called
    return None


def _agree(
    base: NamedModule | None, donor: NamedModule | None, heads: tuple[nn.Module | None, nn.Module | None]
) -> bool:
    if base is None or donor is None:
        return False
    both_heads = base.called is heads[0] and donor.called is heads[1]
    return both_heads or num_channels(base.layer) == num_channels(donor.layer)


def _shape_text(module: NamedModule | None) -> str:
    if module is None:
        return "no such module"
    return f"{num_channels(module.layer)} channels (weight {list(full_shape(weight_of(module.layer)))})"


def _some_names(model: nn.Module) -> str:
    names = list(_with_channels(model))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
