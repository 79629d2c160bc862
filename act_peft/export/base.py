"""What an export has to know of the base model: names and shapes of its modules, and which weights are shared."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import PreTrainedModel

from act_peft.channels.kinds import ChannelKind, channel_kind, features
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.skeleton import build_skeleton, load_config
from act_peft.errors import ActValueError
from act_peft.layers import ActLayer
from act_peft.layers.lookup import embedding, shared_parameters


@dataclass(frozen=True)
class BaseFacts:
    """The base model of an adapter.

    Attributes:
        known: names of its modules with a weight.
        shapes: name of every linear layer -> O and I.
        shared: names of embeddings and output layers that share their weight.
        heads: names of embeddings and output layers.
        skeleton: the model without data, for PEFT to wrap; None where it cannot be built.
    """

    known: list[str]
    shapes: Mapping[str, tuple[int, int]]
    shared: frozenset[str]
    heads: frozenset[str]
    skeleton: PreTrainedModel | None


def facts_in_memory(model: nn.Module, *, with_skeleton: bool) -> BaseFacts:
    """Those of a model in memory, without PEFT's outer wrappers; its modules may be wrapped in ours."""
    return _facts(model, _skeleton(model) if with_skeleton else None)


def facts_on_disk(location: str | os.PathLike[str], names: Iterable[str], *, must_exist: bool) -> BaseFacts | None:
    """Those of a checkpoint's configuration; None if it cannot be found, or its model does not have these modules.

    Args:
        location: folder or Hub id of the base; only what is on this machine is read, unless it must exist.
        names: modules of the adapter.
        must_exist: whether a base that cannot be read is an error.

    Raises:
        ActValueError: it must exist and cannot be read.
    """
    found = location if must_exist else _on_this_machine(location)
    if found is None:
        return None
    try:
        with Checkpoint.open(found) as checkpoint:
            skeleton = build_skeleton(load_config(checkpoint), checkpoint)
    except ActValueError:
        if must_exist:
            raise
        return None
    facts = _facts(skeleton, skeleton)
    return facts if set(names) <= set(facts.known) else None


def _on_this_machine(location: str | os.PathLike[str]) -> str | os.PathLike[str] | None:
    """The folder, or the snapshot in the Hub's cache; None if there is none."""
    if os.path.isdir(location):
        return location
    try:
        return snapshot_download(os.fspath(location), local_files_only=True)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError):
        return None


def _facts(model: nn.Module, skeleton: PreTrainedModel | None) -> BaseFacts:
    shared = shared_parameters(model)
    layers = {
        name: module.get_base_layer() if isinstance(module, ActLayer) else module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and not name.endswith(".base_layer")
    }
    ends = [embedding(model, "get_input_embeddings"), embedding(model, "get_output_embeddings")]
    plain_ends = [end.get_base_layer() if isinstance(end, ActLayer) else end for end in ends]
    kinds = {name: channel_kind(module) for name, module in layers.items()}
    heads = {n for n, m in layers.items() if kinds[n] is ChannelKind.EMBEDDING or any(m is end for end in plain_ends)}
    return BaseFacts(
        known=list(layers),
        shapes={n: features(m)[::-1] for n, m in layers.items() if kinds[n] is ChannelKind.LINEAR},
        shared=frozenset(n for n in layers if id(layers[n].weight) in shared),
        heads=frozenset(heads),
        skeleton=skeleton,
    )


def _skeleton(model: nn.Module) -> PreTrainedModel | None:
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception:  # classes of users may need more than a configuration
        return None
