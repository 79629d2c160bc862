"""Which modules of two models are compared, and whether they can be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from act_peft.channels import ChannelKind, channel_kind, num_channels, weight_of
from act_peft.errors import ActTypeError, ActValueError
from act_peft.names import Patterns, matches

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Candidates:
    """The compared modules of two models; the three mappings have the same keys, in the base's order.

    Attributes:
        base: module name -> module of the base.
        donor: module name -> module of the donor.
        num_channels: module name -> number of channels C.
        embeddings: names of the embeddings.
    """

    base: dict[str, nn.Module]
    donor: dict[str, nn.Module]
    num_channels: dict[str, int]
    embeddings: frozenset[str]


def find_candidates(
    base: nn.Module, donor: nn.Module, *, target_modules: Patterns = None, exclude_modules: Patterns = None
) -> Candidates:
    """The modules that have channels, narrowed as in PEFT; checked to be the same in both models.

    Args:
        base: the base.
        donor: the donor.
        target_modules: regular expression for the whole name, names or dotted suffixes, or `"all-linear"` (every
            linear and Conv1D module but the output layer); None takes every module that has channels.
        exclude_modules: regular expression, names or dotted suffixes to leave out.

    Raises:
        ActTypeError: a model is no `torch.nn.Module`.
        ActValueError: nothing is left, or the models differ in a candidate's presence or number of channels.
    """
    for role, model in (("base", base), ("donor", donor)):
        if not isinstance(model, nn.Module):
            raise ActTypeError(
                f"{role}: got {type(model).__name__}, expected a torch.nn.Module (load the model first)"
            )
    mine = _select(base, target_modules, exclude_modules)
    theirs = _select(donor, target_modules, exclude_modules)
    if not mine and not theirs:
        raise ActValueError(
            f"target_modules: got {target_modules!r} without {exclude_modules!r}, which leaves no module that has "
            f"channels (the base has: {_some_names(base)})"
        )
    differing = [name for name in {**mine, **theirs} if not _agree(mine.get(name), theirs.get(name))]
    if differing:
        name = differing[0]
        raise ActValueError(
            f"{name}: donor has {_in_words(theirs.get(name))}, the base has {_in_words(mine.get(name))} "
            f"({len(differing)} of {len({**mine, **theirs})} modules differ; take two models of the same structure, "
            "or leave these out with exclude_modules)"
        )
    return Candidates(
        base=mine,
        donor={name: theirs[name] for name in mine},
        num_channels={name: num_channels(module) for name, module in mine.items()},
        embeddings=frozenset(n for n, m in mine.items() if channel_kind(m) is ChannelKind.EMBEDDING),
    )


def _select(model: nn.Module, targets: Patterns, excluded: Patterns) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if channel_kind(module) is not None}
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = (ChannelKind.LINEAR, ChannelKind.CONV1D)
        output_layer = _output_layer(model)
        modules = {n: m for n, m in modules.items() if channel_kind(m) in linear and m is not output_layer}
    elif targets is not None:
        modules = {name: module for name, module in modules.items() if matches(name, targets)}
    return {name: module for name, module in modules.items() if not matches(name, excluded)}


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _agree(mine: nn.Module | None, theirs: nn.Module | None) -> bool:
    return mine is not None and theirs is not None and num_channels(mine) == num_channels(theirs)


def _in_words(module: nn.Module | None) -> str:
    if module is None:
        return "no such module"
    return f"{num_channels(module)} channels (weight {list(weight_of(module).shape)})"


def _some_names(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if channel_kind(module) is not None]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
