"""Donors: a model in memory, a checkpoint on disk, or a PEFT adapter of the base."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from act_peft.adapter.file import CONFIG, AdapterFolder
from act_peft.disk.checkpoint import INDEX, SINGLE, SMALL_FILES, Checkpoint, read_json
from act_peft.disk.locations import Location, open_location
from act_peft.disk.parameters import Parameters
from act_peft.disk.skeleton import load_config
from act_peft.errors import ActTypeError, ActValueError
from act_peft.peft_modules import has_adapters
from act_peft.transfer.donors.act import ActDonor
from act_peft.transfer.donors.base import OpenDonor
from act_peft.transfer.donors.full import FullDonor
from act_peft.transfer.donors.lora import LoraDonor
from act_peft.transfer.lineage import check_configs, model_types
from act_peft.transfer.parameters import ModelTensors

__all__ = ["OpenDonor", "is_adapter", "open_donor"]


def open_donor(
    donor: nn.Module | str | os.PathLike[str],
    base: Parameters,
    *,
    axes: Mapping[str, int],
    config: Any = None,
    vocabulary: Collection[str] = (),
    revision: str | None = None,
) -> OpenDonor:
    """Open a donor and check that it fits the base; none of its weights is read yet.

    Args:
        donor: a model in memory; or the folder or Hub id of a checkpoint, or of a LoRA or ACT adapter of the base.
        base: the parameters of the base.
        axes: module -> axis of its channels, for the modules that will be read.
        config: the base's transformers configuration, if it has one.
        vocabulary: names of the base's parameters whose first axis counts tokens.
        revision: revision on the Hub.

    Raises:
        ActTypeError: neither a model nor a name; a model with adapters in it.
        ActValueError: nothing is there; a damaged file; a different architecture or structure; an adapter of a method
            that is not supported.
    """
    needed = [f"{module}.{part}" for module in axes for part in ("weight", "bias") if f"{module}.{part}" in base]
    if isinstance(donor, nn.Module):
        if has_adapters(donor):
            raise ActTypeError(
                f"donor: got a {type(donor).__name__} with adapters in it, expected a plain model (merge them with "
                "merge_and_unload(), or name the folder of the adapter)"
            )
        notes = [] if config is None or not hasattr(donor, "config") else check_configs(config, donor.config)
        theirs = Parameters(ModelTensors(donor), base.names)
        return FullDonor(base, theirs, needed=needed, vocabulary=vocabulary, notes=notes)
    if not isinstance(donor, (str, os.PathLike)):
        raise ActTypeError(f"donor: got {type(donor).__name__}, expected a model, or the folder or Hub id of one")
    place = open_location(donor, expected="a checkpoint", files=SMALL_FILES, revision=revision)
    if is_adapter(place):
        return _open_adapter(place, base, axes=axes)
    checkpoint = Checkpoint(place)
    try:
        notes = [] if config is None else check_configs(config, load_config(checkpoint))
        mine = base.shapes()
        theirs = Parameters(
            checkpoint,
            base.names,
            fits=lambda name, shape: tuple(shape) == mine.get(name),
            model_types=model_types(config),
        )
        return FullDonor(base, theirs, needed=needed, vocabulary=vocabulary, notes=notes, checkpoint=checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def is_adapter(location: str | os.PathLike[str] | Location) -> bool:
    """Whether a folder or Hub id holds a PEFT adapter rather than a full checkpoint.

    Raises:
        ActValueError: if there is no such folder or repository.
    """
    place = open_location(location, expected="a checkpoint", files=SMALL_FILES)
    if not (place.folder / CONFIG).is_file():
        return False
    weights = (SINGLE, INDEX) if place.is_local else ("config.json",)  # weights on the Hub are not downloaded yet
    return not any((place.folder / name).is_file() for name in weights)


def _open_adapter(place: Location, base: Parameters, *, axes: Mapping[str, int]) -> OpenDonor:
    config = read_json(place.folder, CONFIG)
    kind = config.get("peft_type")
    if kind == "LORA":
        return LoraDonor(place, config, base, axes=axes)
    if kind == "ACT":
        adapter = AdapterFolder(place)
        try:
            return ActDonor(adapter, base, axes=axes)
        except BaseException:
            adapter.close()
            raise
    raise ActValueError(
        f"{place.name}: got an adapter of type {str(kind)[:40]}, expected LoRA or ACT (merge it with "
        "model.merge_and_unload(), save the model and name its folder as donor)"
    )
