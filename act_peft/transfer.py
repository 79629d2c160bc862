"""Transfer: the donor's difference of the selected channels becomes the delta of an adapter."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import skip_init_on_device
from torch import nn
from transformers import PreTrainedModel

from act_peft.channels import is_quantised, kind_of
from act_peft.donors import Donor, open_donor
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.layers import ActLayer
from act_peft.layers.rows import ChannelRows
from act_peft.lineage import Resemblance
from act_peft.parameters import ModelTensors, Parameters, vocabulary_parameters
from act_peft.trainable import Trainable


def initialize_from_donor(
    model: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    *,
    transfer_scale: float | None = None,
    adapter_name: str = "default",
) -> None:
    """Fill the deltas of an existing ACT adapter with a donor's difference.

        delta[i, :] = λ * (W_donor[i, :] - W_base[i, :])          for every selected channel i

    (arXiv 2601.09398, the transfer step), the same for the elements of biases and norms. What the deltas held before
    is replaced. With learned scales the delta becomes the difference itself, and every scale starts again at λ.

    Args:
        model: a `PeftModel` with an ACT adapter, or a model that an ACT adapter was injected into.
        donor: a model in memory; or the folder or Hub id of a checkpoint, or of a LoRA or ACT adapter of the same
            base, of which only the selected channels are read.
        transfer_scale: λ; by default the one of the adapter's configuration.
        adapter_name: name of the adapter.

    Raises:
        ActValueError: if the model has no such adapter, the adapter is merged, λ is not finite, or the donor's
            modules, shapes or architecture differ from the base's, or its selected weights are not finite. Nothing
            is changed then.
        ActTypeError: if `donor` is neither a module nor a name.

    Warns:
        ActWarning: once, if vocabulary (tokens that the donor lacks get no delta), rotary base or context length
            differ, or the weights look unrelated.
    """
    layers = adapter_layers(model, adapter_name)
    config = cast(Any, model).peft_config[adapter_name]
    scale = config.transfer_scale if transfer_scale is None else transfer_scale
    if not math.isfinite(scale):
        raise ActValueError(f"transfer_scale: got {scale}, expected a finite number")
    merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ActValueError(
            f"{merged[0]}: adapter {adapter_name!r} is merged, expected an unmerged one (unmerge first)"
        )
    index = {name: layer.act_delta_index[adapter_name] for name, layer in layers.items()}
    with donor_for_model(base_model(model), donor, index) as transfer:
        learned = Trainable(config.trainable).has_scales
        scaled = transfer.deltas(index, transfer_scale=1.0 if learned else scale)
        # All of them before the first is written, each in the dtype and on the device of what it will overwrite.
        deltas = [(name, layers[name].as_stored(adapter_name, rows)) for name, _, rows in scaled]
        transfer.warn(stacklevel=2)
    fill_deltas(layers, deltas, adapter_name=adapter_name, transfer_scale=scale)
    named = getattr(donor, "name_or_path", "") or None if isinstance(donor, nn.Module) else os.fspath(donor)
    config.transfer_scale, config.donor = float(scale), named


def base_model(model: nn.Module) -> nn.Module:
    """The model that the layers were injected into, without the wrappers of PEFT and `torch.compile` around it.

    Raises:
        ActTypeError: for a wrapper that trains in parallel.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ActTypeError(f"got a {type(model).__name__}, expected the model inside (its attribute `module`)")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, ActLayer]:
    """The ACT layers that have an adapter, by the names of their modules in the base model.

    Raises:
        ActValueError: if there is none.
    """
    layers = {
        name: module
        for name, module in base_model(model).named_modules()
        if isinstance(module, ActLayer) and adapter_name in module.act_delta_index
    }
    if not layers:
        raise ActValueError(
            f"{type(model).__name__}: has no ACT adapter {adapter_name!r}, expected one "
            "(create it with get_peft_model(model, ActConfig(channels=...)))"
        )
    return layers


class Transfer:
    """A donor, checked against the base, and what it gives; a context manager that closes the donor.

    Args:
        base: the parameters of the base.
        donor: the donor.
        axes: module -> axis of its channels.
    """

    def __init__(self, base: Parameters, donor: Donor, axes: Mapping[str, int]) -> None:
        self._base, self._donor, self._axes = base, donor, axes
        self._notes = list(donor.notes)
        self._resemblance = Resemblance()
        self._differs = False

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._donor.close()

    def common(self, index: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The selected channels without those beyond the common vocabulary.

        Args:
            index: module -> selected channels, int64 `[K]`.

        Raises:
            ActValueError: nothing is left of a module.
        """
        kept = dict(index)
        for name, channels in index.items():
            limit = self._donor.common_channels(name) if self._axes[name] == 0 else None
            if limit is None or int(channels[-1]) < limit:
                continue
            kept[name] = channels[channels < limit]
            dropped = channels.numel() - kept[name].numel()
            if not kept[name].numel():
                raise ActValueError(
                    f"{name}: all {dropped} selected channels lie beyond the {limit} tokens that donor and base have "
                    f"in common, expected others (leave it out with exclude_modules=[{name!r}])"
                )
            self._notes.append(f"{name}: {dropped} selected channels beyond the common vocabulary are left out")
        return kept

    def deltas(
        self, index: Mapping[str, torch.Tensor], *, transfer_scale: float
    ) -> Iterator[tuple[str, ChannelRows, ChannelRows]]:
        """Module by module: its name, the base's selected channels, and their deltas.

            delta = transfer_scale * (donor - base)          in float32 or wider

        Args:
            index: module -> selected channels, int64 `[K]`, ascending.
            transfer_scale: λ.

        Raises:
            ActValueError: values that are not finite, or quantised.
        """
        for name, channels in index.items():
            channels = channels.cpu()
            base: dict[str, torch.Tensor | None] = {"weight": None, "bias": None}
            deltas = dict(base)
            for part, dim in (("weight", self._axes[name]), ("bias", 0)):
                if f"{name}.{part}" not in self._base:
                    continue
                mine = self._base.rows(f"{name}.{part}", channels, dim)
                difference = self._donor.difference(name, part, channels, dim, mine)
                self._resemblance.add_(name, mine, difference)
                self._differs = self._differs or bool(difference.any())
                base[part], deltas[part] = mine, difference.mul_(transfer_scale)
            yield (
                name,
                ChannelRows(channels, cast(torch.Tensor, base["weight"]), base["bias"]),
                ChannelRows(channels, cast(torch.Tensor, deltas["weight"]), deltas["bias"]),
            )

    def warn(self, *, stacklevel: int) -> None:
        """Say once what differs between donor and base; to be called after `deltas`.

        Args:
            stacklevel: as in `warnings.warn`, counted from the caller.

        Warns:
            ActWarning: if there is anything to say; if nothing differs.
        """
        if not self._differs:
            message = f"{self._donor.location}: is the base's equal in all selected channels, nothing moves over"
            warnings.warn(message, ActWarning, stacklevel=stacklevel + 1)
        notes = self._notes if self._donor.is_adapter else [*self._notes, *self._resemblance.notes()]
        if notes:
            warnings.warn(f"donor and base differ: {'; '.join(notes)}", ActWarning, stacklevel=stacklevel + 1)


def donor_for_model(
    base: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    modules: Iterable[str],
    *,
    revision: str | None = None,
) -> Transfer:
    """The transfer from a donor to a model in memory.

    Args:
        base: the base model, with or without adapters in it.
        donor: as in `open_donor`.
        modules: names of the modules that channels will move to.
        revision: revision of the donor on the Hub.

    Raises:
        ActTypeError, ActValueError: as `open_donor`; ActValueError if one of the modules is quantised.
    """
    plain = {name: _plain(base.get_submodule(name)) for name in modules}
    quantised = [name for name, module in plain.items() if is_quantised(module)]
    if quantised:
        raise ActValueError(
            f"{quantised[0]}: is quantised, expected the base's own values, which the donor's difference is taken "
            f"from ({len(quantised)} of {len(plain)} modules are quantised; make the adapter from the original "
            "checkpoint with create_adapter and load it here with PeftModel.from_pretrained)"
        )
    tensors = ModelTensors(base)
    parameters = Parameters(tensors, tensors.names)
    axes = {name: kind_of(module).channel_dim for name, module in plain.items()}
    config = base.config if isinstance(base, PreTrainedModel) else None
    vocabulary = vocabulary_parameters(base)
    opened = open_donor(donor, parameters, axes=axes, config=config, vocabulary=vocabulary, revision=revision)
    return Transfer(parameters, opened, axes)


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@skip_init_on_device  # inside `low_cpu_mem_usage` the deltas would be created on the meta device
def fill_deltas(
    layers: Mapping[str, ActLayer],
    deltas: Iterable[tuple[str, ChannelRows]],
    *,
    adapter_name: str,
    transfer_scale: float,
) -> None:
    """Write deltas, given by the names of their modules, into the layers, each as it comes.

    Args:
        layers: module name -> layer.
        deltas: module name and deltas; with learned scales the difference itself.
        adapter_name: name of the adapter.
        transfer_scale: where learned scales start.
    """
    for name, rows in deltas:
        layers[name].write_deltas(adapter_name, rows, transfer_scale=transfer_scale)
