"""Checks of an adapter for a serving engine: nothing that it would refuse, drop or scale differently."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from act_peft.channels.kinds import ChannelKind
from act_peft.doors import EMBEDDING_LAYER_NAMES
from act_peft.errors import ActValueError, ActWarning
from act_peft.export.base import BaseFacts
from act_peft.export.targets import Engine, listed


def check_for_engine(
    engine: Engine, kinds: Mapping[str, ChannelKind], base: BaseFacts | None, whole: Collection[str]
) -> None:
    """Check what an adapter holds against what an engine takes.

    Args:
        engine: the engine.
        kinds: module name -> kind, of the modules with factors.
        base: what is known of the base.
        whole: names of modules and tokens that are saved as a whole.

    Raises:
        ActValueError: there is something that the engine cannot load.

    Warns:
        ActWarning: there is something that it loads for some models only, or the base is not known.
    """
    if whole:
        raise ActValueError(
            f"{listed(sorted(whole))}: {engine.name} loads factors only, expected no modules or tokens that are saved "
            "as a whole (merge the adapter with merge_checkpoint or merge_and_unload and serve the merged model)"
        )
    conv1d = sorted(name for name, kind in kinds.items() if kind is ChannelKind.CONV1D)
    if conv1d and not engine.reads_conv1d:
        raise ActValueError(
            f"{listed(conv1d)}: {engine.name} cannot load factors of GPT-2's transposed layers (Conv1D), expected "
            "linear ones (merge the adapter and serve the merged model)"
        )
    ends = {name for name, kind in kinds.items() if kind is ChannelKind.EMBEDDING or _is_end(name, base)}
    shared = sorted(ends & base.shared) if base is not None else []
    if shared and not engine.has_own_heads:
        raise ActValueError(
            f"{listed(shared)}: {engine.name} has one tensor for an embedding and an output layer that share their "
            "weight, expected no change of one of them (make the adapter without, or merge it)"
        )
    if ends and engine.has_own_heads:
        warnings.warn(
            f"{listed(sorted(ends))}: {engine.name} loads factors of embeddings and output layers only for models "
            "that declare them (Llama and Mistral do); others refuse the adapter (make it without "
            "these modules, or merge it)",
            ActWarning,
            stacklevel=4,
        )
    elif ends and base is None:
        warnings.warn(
            f"{listed(sorted(ends))}: the base is not on this machine, so it is not known whether these modules share "
            f"their weight, which {engine.name} cannot load (pass base=...)",
            ActWarning,
            stacklevel=4,
        )


def missing_siblings(
    engine: Engine, kinds: Mapping[str, ChannelKind], base: BaseFacts | None
) -> dict[str, tuple[int, int]]:
    """Modules that an engine wants beside those of the adapter, with zeros: name -> O and I.

    Raises:
        ActValueError: there may be some, and the base is not known.
    """
    wanted = sorted({other for name in kinds for other in engine.siblings(name)} - set(kinds))
    if wanted and base is None:
        raise ActValueError(
            f"{listed(wanted)}: {engine.name} loads {' or '.join('/'.join(group) for group in engine.fused)} of a "
            "layer only together, and the base, whose shapes their zeros have, is not on this machine, expected it "
            "(pass base=...)"
        )
    return {name: base.shapes[name] for name in wanted if name in base.shapes} if base is not None else {}


def _is_end(name: str, base: BaseFacts | None) -> bool:
    return name in base.heads if base is not None else name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
