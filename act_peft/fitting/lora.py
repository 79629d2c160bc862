"""LoRA adapters made of a fitted transfer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import ModelCardData
from peft import LoraConfig

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import exact_arithmetic, wide_dtype
from act_peft.disk.folders import check_output
from act_peft.disk.parameters import Parameters
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.fitting.adapter_parts import Tensors, needed_base, token_indices, token_tensors, write_adapter
from act_peft.fitting.module import FitRecord, FittedModule, Modules
from act_peft.fitting.token_factors import token_factors


@dataclass(frozen=True)
class FittedLora:
    """What `FittedTransfer.to_lora` wrote.

    Attributes:
        folder: the adapter's folder.
        ranks: module name -> rank of its factors.
        errors: module name -> share of what the fitted change gains that the factors lose, from 0 to 1: for linear
            modules the sum of squares of the singular values that are left out, over that of all.
        error: the same for all these modules together.
        left_out: fitted modules that the adapter does not have, and biases, `NAME.bias`.
    """

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float
    left_out: tuple[str, ...]


@exact_arithmetic()
def write_lora(
    output: Path,
    modules: Modules,
    record: FitRecord,
    *,
    rank: int,
    embedding_rank: int | None,
    norms: bool,
    tokens: Mapping[str, torch.Tensor],
    base: Parameters | None,
    overwrite: bool,
) -> FittedLora:
    """Write a LoRA adapter; arguments as `FittedTransfer.to_lora`, `base` and `tokens` as in `write_act`.

    Raises:
        ActValueError: as `FittedTransfer.to_lora`.
    """
    check_output(output, [], overwrite=overwrite)
    factored = {name: module for name, module in modules.items() if module.is_linear}
    if not factored:
        raise ActValueError("got a fit without linear modules, expected at least one (norms and tokens have no rank)")
    embeddings = {n: m for n, m in modules.items() if m.is_embedding} if embedding_rank is not None else {}
    if embeddings and tokens:
        raise ActValueError(
            "tokens: given with embedding_rank, expected one of them (an embedding has factors or rows of tokens)"
        )
    # PEFT cannot merge a bias into a layer that has none, and allows none beside an embedding.
    biased = not embeddings and all(module.bias is not None for module in factored.values())
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    lost: dict[str, float] = {}
    for name, module in factored.items():
        left, right, bias = factors(name, module, rank)
        tensors |= _linear_tensors(name, left, right)
        if biased and bias is not None:
            tensors[f"{OUTER}{name}.lora_B.bias"] = bias.to(torch.float32)
        ranks[name], lost[name] = len(right), _lost(module, rank)
    for name, module in embeddings.items():
        left, right, lost[name] = embedding_factors(module, embedding_rank or rank)
        for one in module.names:
            tensors |= (
                _linear_tensors(one, left, right) if one == module.head else _embedding_tensors(one, left, right)
            )
            ranks[one] = len(right)
    whole = [name for name, module in modules.items() if module.kind.is_norm] if norms else []
    for name in whole:
        tensors |= _norm_tensors(name, modules[name], base)
    tensors |= token_tensors(modules, tokens, base)
    left_out = [name for name in modules if name not in {*ranks, *whole, *tokens}]
    if not biased:
        left_out += [f"{name}.bias" for name, module in factored.items() if module.bias is not None]
    gained = {name: float(modules[name].gains.sum()) for name in lost}
    errors = {name: value / gained[name] if gained[name] else 0.0 for name, value in lost.items()}
    error = sum(lost.values()) / (sum(gained.values()) or 1.0)
    is_tied = any(module.is_tied for module in embeddings.values())
    known = [one for module in modules.values() for one in module.names]
    config = _lora_config(record, ranks, whole, tokens, factored=factored, known=known, biased=biased, is_tied=is_tied)
    write_adapter(output, tensors, config, _lora_card(record, ranks, errors, error, left_out, is_tied=is_tied))
    return FittedLora(output, MappingProxyType(ranks), MappingProxyType(errors), error, tuple(left_out))


def embedding_factors(module: FittedModule, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """B `[V, r]` and A `[r, H]` with B A the best change of rank r of an embedding, and the gain that it loses.

    Raises:
        ActValueError: the module has no metric of its tokens.
    """
    if module.token_metric is None or module.token_weights is None:
        raise ActValueError(
            f"{module.names[0]}: has no metric of its tokens, expected one (the file is damaged; fit again)"
        )
    left, right, lost = token_factors(module.delta, module.token_metric, module.token_weights, rank)
    return left.float(), right.float(), lost


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


def _lost(module: FittedModule, rank: int) -> float:
    """Sum of squares of the singular values after the first `rank`."""
    return 0.0 if module.strengths is None else float(module.strengths[rank:].square().sum())


def _linear_tensors(name: str, left: torch.Tensor, right: torch.Tensor) -> Tensors:
    parts = {"lora_A.weight": right, "lora_B.weight": left}
    return {f"{OUTER}{name}.{part}": tensor.to(torch.float32).contiguous() for part, tensor in parts.items()}


def _embedding_tensors(name: str, left: torch.Tensor, right: torch.Tensor) -> Tensors:
    """PEFT's factors of an embedding are those of its transpose `[H, V]`."""
    parts = {"lora_embedding_A": left.T, "lora_embedding_B": right.T}
    return {f"{OUTER}{name}.{part}": tensor.to(torch.float32).contiguous() for part, tensor in parts.items()}


def _norm_tensors(name: str, module: FittedModule, base: Parameters | None) -> Tensors:
    """`modules_to_save` stores whole modules, the base's weights included."""
    found = needed_base(base, name)
    every = torch.arange(len(module.delta))
    tensors = {}
    for part, change in (("weight", module.weight_change()), ("bias", module.bias)):
        if change is not None:
            values = found.rows(f"{name}.{part}", every, 0).cpu()
            tensors[f"{OUTER}{name}.{part}"] = (values.to(wide_dtype(values.dtype)) + change).to(values.dtype)
    return tensors


def _lora_config(
    record: FitRecord,
    ranks: Mapping[str, int],
    whole: Iterable[str],
    tokens: Mapping[str, torch.Tensor],
    *,
    factored: Modules,
    known: Iterable[str],
    biased: bool,
    is_tied: bool,
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
        trainable_token_indices=token_indices(tokens),
        ensure_weight_tying=is_tied,
    )
    config.target_modules = targets  # LoraConfig makes a set of it, whose order changes from run to run
    return config


def _lora_card(
    record: FitRecord,
    ranks: Mapping[str, int],
    errors: Mapping[str, float],
    error: float,
    left_out: Iterable[str],
    *,
    is_tied: bool,
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
        *(["- use it unmerged: PEFT would add the change of the tied embedding twice"] if is_tied else []),
        "\n| module | rank | lost |\n|---|---|---|",
        *(f"| {name} | {rank} | {_shown(errors.get(name))} |" for name, rank in ranks.items()),
    ]
    return "\n".join(lines) + "\n"


def _shown(error: float | None) -> str:
    return "as the embedding" if error is None else f"{error:.3g}"
