"""Types and ranges of an adapter's settings, from a script or from a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from act_peft.channels.masks import ChannelMask, checked_indices
from act_peft.channels.scores import ChannelScores
from act_peft.checks import finite_number, shown, whole_number
from act_peft.errors import ActTypeError, ActValueError

_TEXTS = ("base_model_name_or_path", "revision", "donor_revision", "peft_version")
_FLAGS = ("inference_mode", "offload_deltas")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_GROUP = (list, tuple, set, frozenset)


def check_settings(config: Any) -> None:
    """Check the settings that PEFT uses without a look at them.

    Args:
        config: an `ActConfig`.

    Raises:
        ActTypeError: a setting of a wrong type.
        ActValueError: a value that cannot be used; for example a pattern that is no regular expression.
    """
    for name in _TEXTS:
        _check(name, getattr(config, name), str, "text")
    for name in _FLAGS:
        _check(name, getattr(config, name), bool, "True or False")
    for name in _NAMES:
        value = getattr(config, name)
        if isinstance(value, str):
            _check_pattern(name, value)
        elif value is not None:
            _check_names(name, value)
    for pattern in config.layers_pattern if isinstance(config.layers_pattern, _GROUP) else ():
        _check_pattern("layers_pattern", pattern)
    if config.modules_to_save is not None:
        _check_names("modules_to_save", config.modules_to_save)
    _check("auto_mapping", config.auto_mapping, Mapping, "an object")
    if config.layers_to_transform is not None:
        _check_numbers("layers_to_transform", config.layers_to_transform)
    tokens = config.trainable_token_indices
    if isinstance(tokens, Mapping):
        _check_names("trainable_token_indices", list(tokens))
        tokens = [token for each in tokens.values() for token in _listed("trainable_token_indices", each)]
    if tokens is not None:
        _check_numbers("trainable_token_indices", tokens)
    if config.density is not None:
        finite_number(config.density, "density", least=0, most=1)


def _check(name: str, value: Any, kind: type, expected: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise ActTypeError(f"{name}: got {shown(value)}, expected {expected}")


def _check_pattern(name: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ActValueError(
            f"{name}: got {value[:80]!r}, expected names or a regular expression ({str(error)[:80]})"
        ) from error


def _check_names(name: str, value: Any) -> None:
    if not isinstance(value, _GROUP) or not all(isinstance(each, str) for each in value):
        raise ActTypeError(f"{name}: got {shown(value)}, expected a list of names")


def _listed(name: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, _GROUP):
        raise ActTypeError(f"{name}: got {shown(value)}, expected a list of integers")
    return value


def _check_numbers(name: str, value: Any) -> None:
    for each in value if isinstance(value, (*_GROUP, range)) else [value]:
        whole_number(each, name, least=0, most=2**31)


def checked_donor(donor: Any) -> str:
    """The donor's name as text.

    Raises:
        ActTypeError: for anything else.
    """
    if not isinstance(donor, (str, os.PathLike)):
        raise ActTypeError(
            f"donor: got {type(donor).__name__}, expected a folder or Hub id (for a model in memory leave it out and "
            "call initialize_from_donor(model, donor))"
        )
    return os.fspath(donor)


def checked_channels(channels: Any) -> Any:
    """A mask or a path unchanged; a dict with sorted lists of channels.

    Raises:
        ActTypeError: for anything else.
        ActValueError: for a negative or repeated channel.
    """
    if isinstance(channels, (ChannelMask, str, os.PathLike)):
        return channels
    if isinstance(channels, ChannelScores):
        raise ActTypeError("channels: got ChannelScores, expected a ChannelMask (scores.top(density) selects)")
    if not isinstance(channels, Mapping):
        raise ActTypeError(
            f"channels: got {type(channels).__name__}, expected a ChannelMask, a dict of lists or a path"
        )
    return {name: checked_indices(f"channels[{name!r}]", indices).tolist() for name, indices in channels.items()}
