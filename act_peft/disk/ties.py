"""Tied parameters that part: which tensors a checkpoint needs then, and what its configuration may say."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from act_peft.disk.layout import Layout
from act_peft.errors import ActValueError

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied:
    """What changes in a checkpoint when some of its parameters get new values.

    Attributes:
        copies: parameter that needs a tensor of its own -> the parameter whose values it has so far.
        says_so: whether the configuration has to say that nothing is tied.
    """

    copies: Mapping[str, str] = field(default_factory=dict)
    says_so: bool = False


def untie(layout: Layout, changed: Collection[str]) -> Untied:
    """The tensors that a checkpoint needs so that some of its parameters can change and nothing else does.

    Where the configuration can say that nothing is tied, it does, and every tied parameter has a tensor of its own
    then: the word unties all of them. In a few architectures (T5) it would change what the model computes, or has no
    effect. There the two tensors stand in the file, and transformers ties only what is equal or missing.

    Args:
        layout: the checkpoint.
        changed: names of the parameters.

    Raises:
        ActValueError: a parameter that the architecture cannot untie.
    """
    parting = [group for group in layout.groups if not set(group).isdisjoint(changed)]
    if not parting:
        return Untied()
    tied = {*layout.ties, *layout.ties.values()}
    for group in parting:
        fixed = [name for name in group if name not in tied]
        if fixed:
            raise ActValueError(
                f"{fixed[0]}: is always the same tensor as {next(n for n in group if n != fixed[0])} in a "
                f"{type(layout.model).__name__}, expected channels of a module with a weight of its own (leave it "
                "out)"
            )
    if can_say_untied(layout.model):
        alone = [name for group in layout.groups for name in group if name in tied and not layout.has(name)]
    else:
        alone = _needed(layout, [name for group in parting for name in group], changed)
    copies = {name: holder for name in alone if (holder := layout.holder(name)) is not None}
    return Untied(copies, can_say_untied(layout.model))


def _needed(layout: Layout, members: Collection[str], changed: Collection[str]) -> list[str]:
    """The members without a tensor that have to get one: the changed ones, and who would be tied to those."""
    stored = {name for name in members if layout.has(name)}
    new = [name for name in members if name in changed and name not in stored]
    while True:
        there = {*stored, *new}
        misled = [n for n in members if n not in there and layout.holder(n, there) in changed]
        if not misled:
            return new
        new.append(misled[0])


def can_say_untied(model: PreTrainedModel) -> bool:
    """Whether `tie_word_embeddings: false` unties a model and changes nothing else about it."""
    config = model.config
    as_it_is = type(config).from_dict(copy.deepcopy(config.to_dict())).to_dict()
    untied = type(config).from_dict(without_ties(config.to_dict(), config)).to_dict()
    if untied.get(FLAG) or _without_flags(as_it_is) != _without_flags(untied):
        return False
    models = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    return not any(FLAG in inspect.getsource(each.forward) for each in models)


def without_ties(written: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A configuration, as written in `config.json`, that says that nothing is tied, in all its parts.

    Args:
        written: what is written.
        config: the same as an object, which knows the defaults.
    """
    found = {**written, FLAG: False}
    for name, part in written.items():
        if isinstance(part, dict) and (name == "text_config" or getattr(getattr(config, name, None), FLAG, False)):
            found[name] = without_ties(part, getattr(config, name, None))
    return copy.deepcopy(found)


def parts_with_flag(config: Any) -> Iterator[Any]:
    """A configuration and all parts of it that say that something is tied."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig) and getattr(part, FLAG, False):
            yield from parts_with_flag(part)


def _without_flags(written: Any) -> Any:
    if isinstance(written, dict):
        return {key: _without_flags(value) for key, value in written.items() if key != FLAG}
    return written
