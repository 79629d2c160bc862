"""Fill the adapter of a model from a donor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from act_peft.adapter.models import name_of, record_of
from act_peft.channels.kinds import is_quantized, kind_of
from act_peft.channels.masks import ChannelMask
from act_peft.channels.origin import Origin, check_models
from act_peft.channels.rows import ChannelRows
from act_peft.checks import finite_number
from act_peft.disk.locations import lasting_name
from act_peft.disk.parameters import Parameters
from act_peft.doors import skip_init_on_device
from act_peft.errors import ActValueError, ActWarning
from act_peft.layers import ActLayer
from act_peft.layers.lookup import adapter_layers, base_model, check_unmerged
from act_peft.peft_modules import inner_layer
from act_peft.transfer.difference import Transfer
from act_peft.transfer.donors import open_donor
from act_peft.transfer.parameters import ModelTensors, vocabulary_parameters


def initialize_from_donor(
    model: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    *,
    transfer_scale: float | None = None,
    adapter_name: str = "default",
) -> None:
    """Fill the deltas of an existing ACT adapter with a donor's difference.

        delta[i, :] = λ * (W_donor[i, :] - W_base[i, :])          for every selected channel i

    (arXiv 2601.09398, the transfer step), the same for the elements of biases and norms. The old values of
    the deltas are replaced. With learned scales the delta is the difference itself, and every scale starts again at λ.

    Args:
        model: a `PeftModel` with an ACT adapter, or a model that an ACT adapter was injected into.
        donor: a model in memory; or the folder or Hub id of a checkpoint, or of a LoRA or ACT adapter of the same
            base, of which only the selected channels are read.
        transfer_scale: λ; by default the one of the adapter's configuration.
        adapter_name: name of the adapter.

    Raises:
        ActValueError: the model has no such adapter; the adapter is merged; λ is not finite; the donor's modules,
            shapes or architecture differ from the base's; its selected weights are not finite. Nothing is changed
            then.
        ActTypeError: `donor` is neither a module nor a name.

    Warns:
        ActWarning: once, if vocabulary (a token that the donor does not have gets no delta), rotary base or context
            length differ, or the weights look unrelated.

    Example:
        >>> model = get_peft_model(base, ActConfig(channels=mask, task_type="CAUSAL_LM"))
        >>> initialize_from_donor(model, donor, transfer_scale=0.4)
    """
    layers = adapter_layers(model, adapter_name)
    config = cast(Any, model).peft_config[adapter_name]
    scale = finite_number(config.transfer_scale if transfer_scale is None else transfer_scale, "transfer_scale")
    check_unmerged(layers, adapter_name)
    index = {name: layer.act_delta_index[adapter_name] for name, layer in layers.items()}
    origin = origin_of(config.channels)
    with donor_for_model(base_model(model), donor, index, origin=origin) as transfer:
        learned = config.trains.has_scales
        scaled = transfer.deltas(index, transfer_scale=1.0 if learned else scale)
        # All are read before the first one is written, each in dtype and on the device of the delta that it replaces.
        deltas = [(name, layers[name].as_stored(adapter_name, rows)) for name, _, rows in scaled]
        transfer.warn(stacklevel=2)
    fill_deltas(layers, deltas, adapter_name=adapter_name, transfer_scale=scale)
    named = name_of(donor) if isinstance(donor, nn.Module) else lasting_name(donor)
    config.transfer_scale, config.donor = scale, named


def donor_for_model(
    base: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    modules: Iterable[str],
    *,
    revision: str | None = None,
    origin: Origin | None = None,
) -> Transfer:
    """Prepare the transfer from a donor to a model in memory.

    Args:
        base: the base model, with or without adapters in it.
        donor: as in `open_donor`.
        modules: names of the modules that will get deltas.
        revision: revision of the donor on the Hub.
        origin: of the mask, if it is known.

    Raises:
        ActTypeError, ActValueError: as `open_donor`; ActValueError if one of the modules is quantized, or base and
            donor are exchanged.
    """
    plain = {name: inner_layer(base.get_submodule(name)) for name in modules}
    quantized = [name for name, module in plain.items() if is_quantized(module)]
    if quantized:
        raise ActValueError(
            f"{quantized[0]}: is quantized, expected the base's original values, which the difference needs "
            f"({len(quantized)} of {len(plain)} modules are quantized; make the adapter from the original "
            "checkpoint with create_adapter and load it here with PeftModel.from_pretrained)"
        )
    tensors = ModelTensors(base)
    parameters = Parameters(tensors, tensors.names)
    axes = {name: kind_of(module).channel_dim for name, module in plain.items()}
    config = base.config if isinstance(base, PreTrainedModel) else None
    vocabulary = vocabulary_parameters(base)
    opened = open_donor(donor, parameters, axes=axes, config=config, vocabulary=vocabulary, revision=revision)
    return Transfer(parameters, opened, axes, origin=origin)


def warn_of_other_base(channels: Any, base: nn.Module, *, stacklevel: int) -> None:
    """Compare a base with the models that a mask was made with, where no donor is there to be compared too.

    Args:
        channels: of the adapter's configuration.
        base: the base model, with or without adapters in it.
        stacklevel: as in `warnings.warn`, counted from the caller.

    Raises:
        ActValueError: the base is the mask's donor.

    Warns:
        ActWarning: it has other weights than the mask's base.
    """
    origin = origin_of(channels)
    if origin is not None:
        tensors = ModelTensors(base)
        record = record_of(Parameters(tensors, tensors.names), origin.modules)
        for note in check_models(origin, base=record):
            warnings.warn(note, ActWarning, stacklevel=stacklevel + 1)


def origin_of(channels: Any) -> Origin | None:
    """The two models that the channels of a configuration were found with, where they are known."""
    return channels.origin if isinstance(channels, ChannelMask) else None


@skip_init_on_device  # with `low_cpu_mem_usage` PEFT would create the deltas on the meta device
def fill_deltas(
    layers: Mapping[str, ActLayer],
    deltas: Iterable[tuple[str, ChannelRows]],
    *,
    adapter_name: str,
    transfer_scale: float,
) -> None:
    """Write deltas into the layers, one module after the other.

    Args:
        layers: module name -> layer.
        deltas: module name and deltas; with learned scales the difference itself.
        adapter_name: name of the adapter.
        transfer_scale: first value of learned scales.
    """
    for name, rows in deltas:
        layers[name].write_deltas(adapter_name, rows, transfer_scale=transfer_scale)
