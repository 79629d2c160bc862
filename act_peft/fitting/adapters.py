"""Adapters made of a fitted transfer: ACT adapters of some channels, LoRA adapters of a given rank."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from act_peft.adapter.base_record import fingerprint, module_record
from act_peft.adapter.config import ActConfig
from act_peft.adapter.file import OUTER
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import wide_dtype
from act_peft.disk.atomic import new_folder
from act_peft.disk.folders import check_output, check_room
from act_peft.disk.parameters import Parameters
from act_peft.disk.writing import size_of, write_tensors
from act_peft.errors import ActValueError
from act_peft.fitting.base_weights import rows_of
from act_peft.fitting.module import FitRecord, FittedModule, Modules
from act_peft.layers.deltas import PREFIX

_SLACK = 1 << 20  # bytes kept free for configuration and card
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FittedLora:
    """What `FittedTransfer.to_lora` wrote.

    Attributes:
        folder: the adapter's folder.
        ranks: module name -> rank of its factors.
        errors: module name -> share of what the fitted change gains that the factors lose: the sum of squares of the
            singular values that are left out, over that of all; from 0 to 1.
        error: the same for all these modules together.
        left_out: fitted modules that the adapter does not have, and biases, `NAME.bias`.
    """

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float
    left_out: tuple[str, ...]


def write_act(
    output: Path,
    modules: Modules,
    record: FitRecord,
    *,
    channels: Mapping[str, torch.Tensor],
    tokens: Mapping[str, torch.Tensor],
    base: Parameters | None,
    total: int,
    overwrite: bool,
) -> None:
    """Write an ACT adapter; arguments as `FittedTransfer.to_adapter`.

    Args:
        output: the folder.
        modules: the fitted modules.
        record: what they were made from.
        channels: module name -> channels.
        tokens: name of an embedding -> tokens.
        base: the base's weights, None where they cannot be reached; needed for tokens.
        total: number of all channels that could have been selected.
        overwrite: whether an older adapter is replaced.
    """
    check_output(output, [], overwrite=overwrite)
    if not channels:
        raise ActValueError("mask: selects no channel, expected at least one (PEFT loads no ACT adapter without)")
    tensors: Tensors = {}
    records = {}
    for name, index in channels.items():
        module = modules[name]
        parts = {"index": index, "weight": _in_file_dtype(module.weight_change(index))}
        if module.bias is not None:
            parts["bias"] = _in_file_dtype(module.bias[index])
        tensors |= {f"{OUTER}{name}.{PREFIX}{part}": tensor for part, tensor in parts.items()}
        found = None if base is None else _base_fingerprint(base, name, module, index)
        records[name] = module_record(module.kind, selected=index.numel(), channels=len(module.delta), base=found)
    tensors |= _token_tensors(modules, tokens, base)
    config = ActConfig(
        donor=record.donors[0] if len(record.donors) == 1 else None,
        transfer_scale=1.0,
        task_type=record.task_type,
        inference_mode=True,
        base_model_name_or_path=record.base,
        trainable_token_indices=_token_indices(tokens),
    )
    config.adapted_modules = records
    config.density = sum(index.numel() for index in channels.values()) / total
    _write(output, tensors, config, None)


def write_lora(
    output: Path,
    modules: Modules,
    record: FitRecord,
    *,
    rank: int,
    norms: bool,
    tokens: Mapping[str, torch.Tensor],
    base: Parameters | None,
    overwrite: bool,
) -> FittedLora:
    """Write a LoRA adapter; arguments as `FittedTransfer.to_lora`, `base` and `tokens` as in `write_act`."""
    check_output(output, [], overwrite=overwrite)
    factored = {name: module for name, module in modules.items() if module.is_linear}
    if not factored:
        raise ActValueError("got a fit without linear modules, expected at least one (norms and tokens have no rank)")
    tensors: Tensors = {}
    ranks, errors, losses, totals = {}, {}, 0.0, 0.0
    # PEFT cannot merge a bias into a layer that has none.
    biased = all(module.bias is not None for module in factored.values())
    for name, module in factored.items():
        left, right, bias = factors(name, module, rank)
        ranks[name] = right.shape[0]
        lost, total = _lost(module, rank)
        errors[name] = lost / total if total else 0.0
        losses, totals = losses + lost, totals + total
        tensors |= {
            f"{OUTER}{name}.lora_A.weight": right.to(torch.float32),
            f"{OUTER}{name}.lora_B.weight": left.to(torch.float32),
        }
        if biased and bias is not None:
            tensors[f"{OUTER}{name}.lora_B.bias"] = bias.to(torch.float32)
    whole = [name for name, module in modules.items() if module.kind.is_norm] if norms else []
    for name in whole:
        tensors |= _norm_tensors(name, modules[name], base)
    tensors |= _token_tensors(modules, tokens, base)
    config = _lora_config(record, ranks, whole, tokens, factored=factored, known=list(modules), biased=biased)
    left_out = [name for name in modules if name not in factored and name not in whole and name not in tokens]
    if not biased:
        left_out += [f"{name}.bias" for name, module in factored.items() if module.bias is not None]
    card = _lora_card(record, ranks, errors, losses / totals if totals else 0.0, left_out)
    _write(output, tensors, config, card)
    return FittedLora(
        output,
        MappingProxyType(ranks),
        MappingProxyType(errors),
        losses / totals if totals else 0.0,
        tuple(left_out),
    )


def factors(name: str, module: FittedModule, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """B `[C, r]` and A `[r, I]` with B A the best change of rank r in the metric of the module's inputs.

        B = U_r,    A = U_rᵀ Δ         (U_r: the first r left singular vectors of Δ L)

    Where the module has a bias, Δ has it as a last column, and the bias of B A is returned too, `[C]`. The rank is
    that of the change where that is lower.

    Raises:
        ActValueError: the fit kept fewer directions.
    """
    directions = module.directions
    kept = 0 if directions is None else directions.shape[1]
    possible = 0 if module.strengths is None else int((module.strengths > 0).sum())
    if directions is None or kept < min(rank, possible):
        raise ActValueError(
            f"{name}: got rank {rank}, the fit kept {kept} directions of it, expected at most as many (fit with "
            f"max_rank={rank})"
        )
    left = directions[:, :rank]
    if not left.shape[1]:  # nothing changes
        left = left.new_zeros(len(left), 1)
    right = left.T @ module.delta.to(left)
    bias = None if module.bias is None else left @ (left.T @ module.bias.to(left))
    return left, right, bias


def _lost(module: FittedModule, rank: int) -> tuple[float, float]:
    """Sum of squares of the singular values after the first `rank`, and of all."""
    squares = torch.zeros(0, dtype=torch.float64) if module.strengths is None else module.strengths.square()
    return float(squares[rank:].sum()), float(squares.sum())


# ----------------------------------------------------------------------------------------------------- the parts ---


def _base_fingerprint(base: Parameters, name: str, module: FittedModule, index: torch.Tensor) -> str:
    dim = module.kind.channel_dim
    weight = base.rows(f"{name}.weight", index, dim)
    bias = base.rows(f"{name}.bias", index, 0) if module.bias is not None else None
    return fingerprint(weight, bias)


def _token_tensors(modules: Modules, tokens: Mapping[str, torch.Tensor], base: Parameters | None) -> Tensors:
    """PEFT stores the new rows themselves, not their change."""
    tensors = {}
    for name, index in tokens.items():
        rows = rows_of(_needed(base, name), name, modules[name], index)  # [K, H]
        moved = rows.to(wide_dtype(rows.dtype)) + modules[name].delta[index]
        tensors[f"{OUTER}{name}.token_adapter.trainable_tokens_delta"] = moved.to(rows.dtype)
    return tensors


def _norm_tensors(name: str, module: FittedModule, base: Parameters | None) -> Tensors:
    """`modules_to_save` stores whole modules, the base's weights included."""
    found = _needed(base, name)
    every = torch.arange(len(module.delta))
    tensors = {}
    for part, change in (("weight", module.weight_change()), ("bias", module.bias)):
        if change is not None:
            values = found.rows(f"{name}.{part}", every, 0).cpu()
            tensors[f"{OUTER}{name}.{part}"] = (values.to(wide_dtype(values.dtype)) + change).to(values.dtype)
    return tensors


def _needed(base: Parameters | None, name: str) -> Parameters:
    if base is None:
        raise ActValueError(
            f"{name}: is saved with the base's weights in it, which cannot be reached, expected base=... (the model, "
            "or the folder or Hub id of its checkpoint; or leave norms and tokens out)"
        )
    return base


def _token_indices(tokens: Mapping[str, torch.Tensor]) -> dict[str, list[int]] | None:
    return {name: index.tolist() for name, index in tokens.items()} or None


def _in_file_dtype(change: torch.Tensor) -> torch.Tensor:
    return change.to(wide_dtype(change.dtype)).contiguous()


def _lora_config(
    record: FitRecord,
    ranks: Mapping[str, int],
    whole: Iterable[str],
    tokens: Mapping[str, torch.Tensor],
    *,
    factored: Modules,
    known: Iterable[str],
    biased: bool,
) -> LoraConfig:
    targets, top = sorted(ranks), max(ranks.values())
    # PEFT reads an entry of `target_modules` as a name or its dotted end, and one of a pattern as the end of a name
    # unless it begins with "^".
    unmeant = [n for n in known if n not in ranks and any(n.endswith(f".{t}") for t in targets)]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != top}
    config = LoraConfig(
        task_type=record.task_type,
        base_model_name_or_path=record.base,
        inference_mode=True,
        r=top,
        lora_alpha=top,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets,
        exclude_modules="|".join(map(re.escape, unmeant)) or None,
        lora_dropout=0.0,
        bias="none",
        lora_bias=biased,
        fan_in_fan_out=any(module.kind is ChannelKind.CONV1D for module in factored.values()),
        modules_to_save=list(whole) or None,
        trainable_token_indices=_token_indices(tokens),
    )
    config.target_modules = targets  # LoraConfig makes a set of it, whose order changes from run to run
    return config


def _lora_card(
    record: FitRecord, ranks: Mapping[str, int], errors: Mapping[str, float], error: float, left_out: Iterable[str]
) -> str:
    data = ModelCardData(base_model=record.base or None, library_name="peft", tags=["lora", "peft", "act"])
    donors = ", ".join(name or "a model in memory" for name in record.donors)
    left = ", ".join(left_out)
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        "## LoRA adapter made from a fitted transfer\n",
        "Made with `act_peft.fit`: the part of the donor's difference that its inputs on the ability ask for, cut to",
        "a rank in the metric of these inputs. PEFT loads it as any LoRA adapter; act_peft is not needed.\n",
        f"- base: {record.base or 'unknown'}",
        f"- donor: {donors}",
        f"- share of the fitted gain that the rank loses: {error:.3g}",
        *([f"- fitted, but not in this adapter: {left}"] if left else []),
        "\n| module | rank | lost |\n|---|---|---|",
        *(f"| {name} | {rank} | {errors[name]:.3g} |" for name, rank in ranks.items()),
    ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------- writing ---


def _write(output: Path, tensors: Tensors, config: Any, card: str | None) -> None:
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    infos = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered.items()}
    check_room(output, size_of(infos) + _SLACK)
    with new_folder(output) as folder:
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, infos, ordered.values())
        if card is not None:
            ModelCard(card).save(folder / "README.md")
        config.save_pretrained(str(folder))


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path that does not depend on the current folder."""
    return Path(os.path.abspath(path))
