"""Fitted changes in a model in memory: as the content of its adapters, or added to its weights."""

from __future__ import annotations

from typing import cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from act_peft.channels.rows import exact_arithmetic, wide_dtype
from act_peft.doors import LoraLayer, TrainableTokensLayer
from act_peft.errors import ActValueError
from act_peft.fitting.lora import embedding_factors, factors
from act_peft.fitting.module import FittedModule, Modules
from act_peft.layers import ActLayer
from act_peft.layers.lookup import base_model
from act_peft.layers.rows import ChannelRows
from act_peft.offloading import keeps_elsewhere, values_of
from act_peft.peft_modules import named_modules, without_wrapper

_Write = tuple[torch.Tensor, torch.Tensor]  # a parameter's tensor, and what it will hold


@exact_arithmetic()
def fill_adapter(model: nn.Module, modules: Modules, *, adapter_name: str) -> set[str]:
    """Write the fitted changes into an adapter; arguments and errors as `FittedTransfer.apply_to`.

    Returns:
        The names of the modules that the adapter has.
    """
    writes: list[_Write] = []
    rows: list[tuple[ActLayer, ChannelRows]] = []
    filled = set()
    by_name = {name: module for module in modules.values() for name in module.names}
    for name, layer in _adapted(base_model(model)).items():
        module = by_name.get(name)
        found = True
        if isinstance(layer, ActLayer) and adapter_name in layer.act_delta_index:
            rows.append((layer, _act_rows(name, layer, _known(name, module), adapter_name)))
        elif isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A):
            writes += _lora_writes(name, layer, _known(name, module), adapter_name)
        elif isinstance(layer, TrainableTokensLayer) and adapter_name in layer.trainable_tokens_delta:
            writes.append(_token_write(layer, _known(name, module), adapter_name))
        elif isinstance(layer, ModulesToSaveWrapper) and adapter_name in layer.modules_to_save:
            writes += _whole_writes(layer, _known(name, module), adapter_name)
        else:
            found = False
        if found:
            filled.add(name)
    if not filled:
        raise ActValueError(
            f"{type(model).__name__}: has no adapter {adapter_name!r} of channels, low rank, tokens or whole modules, "
            "expected one (create it with get_peft_model)"
        )
    with torch.no_grad():
        for layer, change in rows:
            layer.write_deltas(adapter_name, change, transfer_scale=1.0)
        for tensor, values in writes:
            tensor.copy_(values)
    return filled


@exact_arithmetic()
def add_changes_(model: nn.Module, modules: Modules) -> None:
    """Add the fitted changes to the weights of a model without adapters; errors as `FittedTransfer.add_to_`."""
    layers = dict(named_modules(without_wrapper(model)))
    adapted = [name for name, found in layers.items() if found.called is not found.layer]
    if adapted:
        raise ActValueError(
            f"{adapted[0]}: has an adapter, expected a model without (merge_and_unload() it, or call apply_to)"
        )
    writes: list[_Write] = []
    for name, module in modules.items():
        layer = layers[name].layer if name in layers else None
        weight = getattr(layer, "weight", None)
        change = module.weight_change()
        if not isinstance(weight, torch.Tensor) or weight.shape != change.shape or not weight.is_floating_point():
            got = f"a weight {list(weight.shape)}" if isinstance(weight, torch.Tensor) else "no such module"
            raise ActValueError(
                f"{name}: the model has {got}, the transfer was fitted for a weight {list(change.shape)} (take the "
                "base that it was fitted for)"
            )
        if keeps_elsewhere(cast(nn.Module, layer)) or weight.device.type == "meta":
            raise ActValueError(
                f"{name}: its weight is offloaded (device meta), expected it in memory (load the base without "
                "offloading, or write a merged checkpoint with merge)"
            )
        writes.append((weight, change))
        if module.bias is not None:
            writes.append((cast(torch.Tensor, cast(nn.Module, layer).bias), module.bias))
    with torch.no_grad():
        for tensor, change in writes:
            wide = wide_dtype(tensor.dtype)
            tensor.copy_(tensor.to(wide) + change.to(tensor.device, wide))


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name of a module -> what PEFT put around it, or into its wrapper."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".token_adapter")
        if isinstance(module, (ActLayer, LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer)):
            found.setdefault(plain, module)
    return found


def _known(name: str, module: FittedModule | None) -> FittedModule:
    if module is None:
        raise ActValueError(
            f"{name}: has an adapter, but no fitted change, expected an adapter of fitted modules only (fit this "
            "module too, or leave it out of the adapter)"
        )
    return module


def _act_rows(name: str, layer: ActLayer, module: FittedModule, adapter_name: str) -> ChannelRows:
    if module.is_embedding:
        raise ActValueError(
            f"{name}: moves by rows of tokens, not by channels, expected an adapter without its channels (tokens can "
            "move: trainable_token_indices)"
        )
    index = layer.act_delta_index[adapter_name].cpu()
    if layer.num_channels != len(module.delta):
        raise ActValueError(
            f"{name}: the model has {layer.num_channels} channels, the transfer was fitted for "
            f"{len(module.delta)} (take the base that it was fitted for)"
        )
    return layer.as_stored(
        adapter_name,
        ChannelRows(index, module.weight_change(index), None if module.bias is None else module.bias[index]),
    )


def _lora_writes(name: str, layer: LoraLayer, module: FittedModule, adapter_name: str) -> list[_Write]:
    rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    if layer.use_dora.get(adapter_name) or not scaling:
        raise ActValueError(f"{name}: is a LoRA variant with weights of its own (DoRA), expected a plain LoRA adapter")
    bias = None
    if adapter_name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter_name].data.T, layer.lora_embedding_B[adapter_name].data.T
        first, second, bias_target = a, b, None  # [V, r] and [r, H]
    else:
        second, first = layer.lora_A[adapter_name].weight.data, layer.lora_B[adapter_name].weight.data
        bias_target = layer.lora_B[adapter_name].bias
    if (first.shape[0], second.shape[1]) != tuple(module.delta.shape):
        raise ActValueError(
            f"{name}: the adapter is for a weight {[first.shape[0], second.shape[1]]}, the transfer was fitted for "
            f"{list(module.delta.shape)} (take the base that it was fitted for)"
        )
    if module.is_embedding:
        left, right, _ = embedding_factors(module, rank)
    else:
        left, right, bias = factors(name, module, rank)
    # A product of equal parts trains better than one of a large and a small factor.
    balance = (right.norm() / left.norm().clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    new_first, new_second = torch.zeros_like(first), torch.zeros_like(second)
    new_first[:, : left.shape[1]] = (left * (balance / scaling)).to(first)
    new_second[: len(right)] = (right / balance).to(second)
    writes = [(first, new_first), (second, new_second)]
    if bias_target is not None:
        change = torch.zeros_like(bias_target) if bias is None else (bias / scaling).to(bias_target)
        writes.append((bias_target.data, change))
    return writes


def _token_write(layer: TrainableTokensLayer, module: FittedModule, adapter_name: str) -> _Write:
    target = layer.trainable_tokens_delta[adapter_name]
    index = torch.tensor(layer.token_indices[adapter_name])
    weight = values_of(layer.get_base_layer(), "weight")
    rows = weight[index.to(weight.device)]
    wide = wide_dtype(rows.dtype)
    return target.data, (rows.to(wide) + module.delta[index].to(rows.device, wide)).to(target)


def _whole_writes(layer: ModulesToSaveWrapper, module: FittedModule, adapter_name: str) -> list[_Write]:
    writes = []
    for part, change in (("weight", module.weight_change()), ("bias", module.bias)):
        if change is not None:
            base = values_of(layer.original_module, part)
            target = getattr(layer.modules_to_save[adapter_name], part)
            wide = wide_dtype(base.dtype)
            writes.append((target.data, (base.to(wide) + change.to(base.device, wide)).to(target)))
    return writes
