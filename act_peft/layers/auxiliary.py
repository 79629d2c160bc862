"""What PEFT trains beside the channels: whole modules (`modules_to_save`) and tokens (`trainable_token_indices`).

PEFT puts a wrapper around such a module, and a copy of it runs. Channels on it or inside it would be left out, or end
up in the copies of other adapters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from act_peft.adapter.config import ActConfig
from act_peft.channels.names import last_part, suffixes
from act_peft.doors import TrainableTokensLayer
from act_peft.errors import ActValueError
from act_peft.layers.lookup import embedding
from act_peft.peft_modules import inner_layer

_ADDED_BY_TASKS = ("classifier", "score", "qa_outputs")  # by PEFT to modules_to_save


def is_saved_whole(config: ActConfig, name: str) -> bool:
    """Whether `modules_to_save` of a configuration takes a module, or one around it."""
    return _saved_key(config, name) is not None


def check_auxiliary(config: ActConfig, model: nn.Module, targets: Collection[str]) -> None:
    """Check that no module has both channels and a wrapper of PEFT, in this adapter or in different ones.

    Args:
        config: the adapter's configuration.
        model: the base model, with or without adapters in it.
        targets: names of all modules for which channels are selected.

    Raises:
        ActValueError: one has both.
    """
    for name in targets:
        _check_not_saved_whole(config, name)
    check_not_hidden(targets, model)
    _check_trained_tokens(config, model, targets)
    for key in (*(config.modules_to_save or ()), *_token_names(config, model)):
        for name, module in model.named_modules():
            if name.endswith(key) and _has_adapter(module):
                raise ActValueError(
                    f"{name}: has an adapter already, expected a module without one to be trained as a whole or by "
                    "tokens (leave it out of modules_to_save and trainable_token_indices, or put the adapters into "
                    "two copies of the model)"
                )


def check_not_hidden(names: Iterable[str], model: nn.Module) -> None:
    """Check that modules are not what a wrapper of PEFT is for, or inside it.

    Args:
        names: of modules, with or without the parts that PEFT's wrappers add; or their last parts.
        model: the base model.

    Raises:
        ActValueError: one is.
    """
    hidden: dict[str, tuple[str, nn.Module]] = {}
    for outer, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            inside = [f"{outer}.{own}".strip(".") for own, _ in wrapper.original_module.named_modules()]
            hidden |= {suffix: (outer, wrapper) for each in inside for suffix in suffixes(each)}
    for name in names:
        plain = re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)", "", name)
        if plain in hidden:
            outer, wrapper = hidden[plain]
            how = "as a whole (modules_to_save)" if isinstance(wrapper, ModulesToSaveWrapper) else "by tokens"
            raise ActValueError(
                f"{plain}: {outer} is trained {how} by another adapter, expected channels of other modules (leave it "
                f"out with exclude_modules=[{last_part(plain)!r}], or put the adapters into two copies of the model)"
            )


def _check_not_saved_whole(config: ActConfig, name: str) -> None:
    key = _saved_key(config, name)
    if key is None:
        return
    tasks = "; tasks such as SEQ_CLS add it: without task_type its channels train" if key in _ADDED_BY_TASKS else ""
    raise ActValueError(
        f"{name}: modules_to_save takes {key!r} as a whole, so the selected channels would be left out, expected one "
        f"or the other (leave the channels out with exclude_modules=[{last_part(name)!r}], or {key!r} out of "
        f"modules_to_save{tasks})"
    )


def _saved_key(config: ActConfig, name: str) -> str | None:
    """The entry of `modules_to_save` for which PEFT wraps a module or one around it; it compares the ends of names."""
    return next((k for k in config.modules_to_save or () if any(n.endswith(k) for n in _with_parents(name))), None)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _has_adapter(module: nn.Module) -> bool:
    return any(
        isinstance(each, BaseTunerLayer) and not isinstance(each, TrainableTokensLayer) for each in module.modules()
    )


def _token_names(config: ActConfig, model: nn.Module) -> list[str]:
    """Ends of the names of the modules whose tokens train."""
    tokens = config.trainable_token_indices
    if tokens is None or isinstance(tokens, dict):
        return list(tokens or ())
    first = embedding(model, "get_input_embeddings")
    return [name for name, module in model.named_modules() if module is first]


def _check_trained_tokens(config: ActConfig, model: nn.Module, targets: Iterable[str]) -> None:
    """Check that PEFT's layer for trained tokens does not come between an adapter and its weight, tied or not."""
    keys = _token_names(config, model)
    trained = {n: inner_layer(m) for n, m in model.named_modules() if any(n.endswith(key) for key in keys)}
    for name in targets:
        weight = inner_layer(model.get_submodule(name))._parameters.get("weight")
        for other, its in trained.items():
            if other == name or (weight is not None and its._parameters.get("weight") is weight):
                what = "is the module" if other == name else f"has the same weight as {other},"
                raise ActValueError(
                    f"{name}: {what} whose tokens trainable_token_indices trains, expected either of them (leave it "
                    f"out with exclude_modules=[{name!r}], or set trainable_token_indices=None)"
                )
