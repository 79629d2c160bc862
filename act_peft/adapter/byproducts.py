"""What an adapter's file holds beside deltas: modules saved as a whole, rows of tokens, embeddings of the base.

PEFT writes them: `modules_to_save`, `trainable_token_indices`, and whole embeddings of a base whose vocabulary was
resized, or where `target_modules` names them (`save_embedding_layers="auto"`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from act_peft.channels.names import suffixes
from act_peft.disk.shard import Shard
from act_peft.doors import OUTER
from act_peft.errors import ActLoadError

_ROWS = "token_adapter.trainable_tokens_delta"
_OLD_ROWS = "token_adapter.trainable_tokens_original"  # the base's rows, which the base has too
_TRAINED = "modules_to_save"
_WRAPPERS = ("token_adapter", "base_layer", "original_module", _TRAINED)
_PARTS = ("weight", "bias")


@dataclass(frozen=True)
class WholeTensor:
    """A whole parameter in an adapter's file.

    Attributes:
        key: of the tensor.
        is_trained: whether it belongs to `modules_to_save`; otherwise it is a tensor of the base that was saved too.
    """

    key: str
    is_trained: bool


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that replace those of the base.

    Attributes:
        index: the tokens.
        order: the row of the tensor for each of them, int64 `[n]`.
        key: of the tensor `[n, H]`.
    """

    index: torch.Tensor
    order: torch.Tensor
    key: str


@dataclass(frozen=True)
class ByProducts:
    """What a file holds beside deltas.

    Attributes:
        whole: parameter -> its tensor.
        tokens: module -> its rows of tokens.
    """

    whole: Mapping[str, WholeTensor] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.whole or self.tokens)

    @property
    def of_base(self) -> Mapping[str, WholeTensor]:
        """The tensors of the base, which were saved without being trained."""
        return {name: tensor for name, tensor in self.whole.items() if not tensor.is_trained}

    @property
    def saved(self) -> Mapping[str, WholeTensor]:
        """The tensors of modules that were trained as a whole."""
        return {name: tensor for name, tensor in self.whole.items() if tensor.is_trained}

    @property
    def trained(self) -> Sequence[str]:
        """The parameters and modules that were trained without being deltas."""
        return [*self.saved, *self.tokens]


def sort_out(location: str, shard: Shard, keys: Iterable[str], config: Mapping[str, Any]) -> ByProducts:
    """Say what the tensors are that are no deltas.

    Args:
        location: the adapter, for messages.
        shard: its file.
        keys: the tensors.
        config: the content of its `adapter_config.json`.

    Raises:
        ActLoadError: a tensor that PEFT writes nowhere, or one that the configuration does not describe.
    """
    whole: dict[str, WholeTensor] = {}
    tokens: dict[str, TokenRows] = {}
    for key in keys:
        name = key.removeprefix(OUTER)
        if name.endswith(f".{_OLD_ROWS}"):
            continue
        if not shard.info(key).is_plain or not key.startswith(OUTER):
            raise _unknown(location, key)
        if name.endswith(f".{_ROWS}"):
            module = name.removesuffix(f".{_ROWS}")
            tokens[module] = _token_rows(location, shard, key, module, config)
            continue
        parts = name.split(".")
        parameter = ".".join(part for part in parts if part not in _WRAPPERS)
        saved = "original_module" not in parts and _is_saved(parameter, config)
        if not saved and (parts[-1] not in _PARTS or len(parts) < 2):
            raise _unknown(location, key)
        if parameter not in whole or saved:
            whole[parameter] = WholeTensor(key, saved)
    return ByProducts(whole, tokens)


def _unknown(location: str, key: str) -> ActLoadError:
    return ActLoadError(
        f"{location}: {key}: got a tensor that is no channel delta, expected those of an ACT adapter and, of other "
        "modules, whole weights and biases or rows of tokens (the file is damaged, or of a different method)"
    )


def _is_saved(parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether a parameter lies in a module that the configuration saves as a whole, by PEFT's rule for names."""
    saved = config.get(_TRAINED) or []
    entries = tuple(entry for entry in saved if isinstance(entry, str) and entry) if isinstance(saved, list) else ()
    owners = parameter.split(".")[:-1]
    return any(".".join(owners[: i + 1]).endswith(entries) for i in range(len(owners)))


def _token_rows(location: str, shard: Shard, key: str, module: str, config: Mapping[str, Any]) -> TokenRows:
    listed = config.get("trainable_token_indices")
    if isinstance(listed, dict):  # rows of a tied output layer are saved too, but not listed
        alone = next(iter(listed.values())) if len(listed) == 1 else None
        listed = next((listed[end] for end in suffixes(module) if end in listed), alone)
    shape = shard.info(key).shape
    known = listed if isinstance(listed, list) else []
    good = all(type(token) is int and 0 <= token < 2**31 for token in known)
    if not known or not good or len(shape) != 2 or len(known) != shape[0] or len(set(known)) != len(known):
        raise ActLoadError(
            f"{location}: {module}: has rows {list(shape)} of tokens {str(listed)[:80]}, expected [n, H] for n "
            "different tokens in trainable_token_indices (adapter_config.json does not belong to the tensors)"
        )
    index, order = torch.tensor(known, dtype=torch.int64).sort()
    return TokenRows(index, order, key)
