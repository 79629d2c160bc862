"""Transfer: the donor's difference of the selected channels becomes the delta of an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import skip_init_on_device
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from act_peft.channels import kind_of, weight_of
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers import ActLayer
from act_peft.lineage import Resemblance, check_configs, check_shapes


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
    is replaced.

    Args:
        model: a `PeftModel` with an ACT adapter, or a model that an ACT adapter was injected into.
        donor: a model in memory, or the folder or Hub id of one.
        transfer_scale: λ; by default the one of the adapter's configuration.
        adapter_name: name of the adapter.

    Raises:
        ActValueError: if the model has no such adapter, the adapter is merged, λ is not finite, or the donor's
            modules, shapes, vocabulary or architecture differ from the base's, or its selected weights are not
            finite. Nothing is changed then.
        ActTypeError: if `donor` is neither a module nor a name.
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
    base = base_model(model)
    if isinstance(donor, nn.Module):
        source, name = donor, getattr(donor, "name_or_path", "") or None
    elif isinstance(donor, (str, os.PathLike)):
        source, name = load_donor(os.fspath(donor), like=base), os.fspath(donor)
    else:
        raise ActTypeError(f"donor: got {type(donor).__name__}, expected a model, or the folder or Hub id of one")
    index = {name: layer.act_delta_index[adapter_name] for name, layer in layers.items()}
    check_donor(base, source, index)
    fill_deltas(layers, source, transfer_scale=scale, adapter_name=adapter_name, index=index)
    config.transfer_scale, config.donor = float(scale), name


def base_model(model: nn.Module) -> nn.Module:
    """The model that the layers were injected into, without PEFT's wrappers around it."""
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


@skip_init_on_device  # inside `low_cpu_mem_usage` the donor would be loaded to nowhere
def load_donor(donor: str, *, like: nn.Module, revision: str | None = None) -> PreTrainedModel:
    """Load a donor as the same class of model as the base, in the dtype of its checkpoint, on the CPU.

    Only safetensors are read, no remote code is run.

    Args:
        donor: folder or Hub id.
        like: the base.
        revision: revision on the Hub.

    Raises:
        ActValueError: if the donor cannot be loaded, has another architecture, or lacks tensors.
    """
    if not isinstance(like, PreTrainedModel):
        raise ActValueError(
            f"donor {donor!r}: the base is a {type(like).__name__}, expected a transformers model "
            "(load the donor yourself and pass it to initialize_from_donor)"
        )
    if os.path.isfile(donor):
        raise ActValueError(f"donor {donor!r}: got a file, expected a folder with a checkpoint, or a Hub id")
    try:
        donor_config = AutoConfig.from_pretrained(donor, revision=revision)
    except (OSError, ValueError) as error:
        raise ActValueError(
            f"donor {donor!r}: cannot be opened, expected a folder with a checkpoint, or a Hub id ({error})"
        ) from error
    check_configs(like.config, donor_config)
    try:
        model, info = type(like).from_pretrained(
            donor, revision=revision, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ActValueError(f"donor {donor!r}: cannot be loaded ({error})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ActValueError(
            f"donor {donor!r}: {missing[0]} is missing in the checkpoint ({len(missing)} tensors are), "
            f"expected a full checkpoint of a {type(like).__name__}"
        )
    return model


def check_donor(base: nn.Module, donor: nn.Module, index: Mapping[str, torch.Tensor]) -> None:
    """Check that the selected channels can move from the donor to the base.

    Args:
        base: the base model, with or without adapters in it.
        donor: the donor.
        index: module name -> selected channels, int64 `[K]`.

    Raises:
        ActValueError: naming the first module that differs and both shapes; for another vocabulary or architecture;
            for values that are not finite.

    Warns:
        ActWarning: once, if rotary base or context length differ or the weights look unrelated.
    """
    notes = []
    if isinstance(base, PreTrainedModel) and isinstance(donor, PreTrainedModel):
        notes = check_configs(base.config, donor.config)
    check_shapes(_shapes(base), _shapes(donor), donor_name=_name(donor))
    resemblance = Resemblance()
    for name, selected in index.items():
        mine, theirs = _rows(base.get_submodule(name), selected), _rows(donor.get_submodule(name), selected)
        for base_part, donor_part in zip(mine, theirs, strict=True):
            if base_part is not None and donor_part is not None:
                resemblance.add_(name, base_part, donor_part)
    resemblance.warn(notes, stacklevel=2)


@skip_init_on_device
def fill_deltas(
    layers: Mapping[str, ActLayer],
    donor: nn.Module,
    *,
    transfer_scale: float,
    adapter_name: str,
    index: Mapping[str, torch.Tensor],
) -> None:
    """Write `transfer_scale * (donor - base)` of the selected channels into the deltas. Check the donor first."""
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = _rows(donor.get_submodule(name), index[name])
            mine = layer.original_rows(index[name])
            for container, donor_part, base_part in (
                (layer.act_delta_weight, theirs[0], mine.weight),
                (layer.act_delta_bias, theirs[1], mine.bias),
            ):
                if donor_part is None or base_part is None:
                    continue
                wide = torch.promote_types(torch.promote_types(donor_part.dtype, base_part.dtype), torch.float32)
                difference = donor_part.to(base_part.device, wide) - base_part.to(wide)
                delta = transfer_scale * difference
                if container[adapter_name].device.type == "meta":
                    parameter = container[adapter_name]
                    container[adapter_name] = nn.Parameter(delta.to(parameter.dtype), parameter.requires_grad)
                else:
                    container[adapter_name].copy_(delta)


def _rows(module: nn.Module, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of some channels of a module, adapted or not."""
    if isinstance(module, ActLayer):
        rows = module.original_rows(index)
        return rows.weight, rows.bias
    weight = weight_of(module)
    index = index.to(weight.device)
    bias: Any = getattr(module, "bias", None)
    return (
        weight.detach().index_select(kind_of(module).channel_dim, index),
        None if bias is None else bias.detach().index_select(0, index),
    )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Parameter names and shapes as they are without adapters."""
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "act_delta_" in name or "modules_to_save." in name or "token_adapter." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        shapes[plain] = list(parameter.shape)
    return shapes


def _name(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__
