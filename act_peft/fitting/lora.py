"""LoRA adapters made of a fitted transfer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import exact_arithmetic, wide_dtype
from act_peft.disk.folders import check_output
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActValueError
from act_peft.export.base import BaseFacts
from act_peft.export.card import card_text
from act_peft.export.config import bias_key, factor_keys, lora_config, whole_key
from act_peft.export.engines import check_for_engine, missing_siblings
from act_peft.export.folder import infos_of, tensor_part, write_folder
from act_peft.export.stock_peft import check_with_peft
from act_peft.export.targets import Target
from act_peft.fitting.adapter_parts import Tensors, needed_base, token_indices, token_tensors
from act_peft.fitting.module import FitRecord, FittedModule, Modules
from act_peft.fitting.token_factors import token_factors
from act_peft.plain import in_markdown


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
    target: Target,
    rank: int,
    embedding_rank: int | None,
    norms: bool,
    tokens: Mapping[str, torch.Tensor],
    base: Parameters | None,
    facts: BaseFacts | None,
    overwrite: bool,
) -> FittedLora:
    """Write a LoRA adapter; arguments as `FittedTransfer.to_lora`, `base` and `tokens` as in `write_act`.

    `facts` is what is known of the base, for the checks.

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
    whole = [name for name, module in modules.items() if module.kind.is_norm] if norms else []
    kinds = {name: module.kind for name, module in factored.items()}
    kinds |= {n: ChannelKind.LINEAR if n == m.head else m.kind for m in embeddings.values() for n in m.names}
    engine = target.engine
    zeros: dict[str, tuple[int, int]] = {}
    if engine is not None:
        check_for_engine(engine, kinds, facts, [*whole, *tokens])
        zeros = missing_siblings(engine, kinds, facts)
    # PEFT cannot merge a bias into a layer that has none, and allows none beside an embedding.
    biased = not embeddings and engine is None and all(module.bias is not None for module in factored.values())
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    tensors: Tensors = {}
    lost: dict[str, float] = {}
    for name, module in factored.items():
        left, right, bias = factors(name, module, rank)
        pairs[name], lost[name] = (left, right), _lost(module, rank)
        if biased and bias is not None:
            tensors[bias_key(name)] = bias.to(torch.float32)
    for name, module in embeddings.items():
        left, right, lost[name] = embedding_factors(module, embedding_rank or rank)
        for one in module.names:  # PEFT's factors of an embedding are those of its transpose [H, V]
            pairs[one] = (left, right) if one == module.head else (right.T, left.T)
    pairs |= {name: (torch.zeros(shape[0], 1), torch.zeros(1, shape[1])) for name, shape in zeros.items()}
    ranks = {name: len(right) for name, (_, right) in pairs.items()}
    if engine is not None:
        ranks = dict.fromkeys(ranks, engine.rank_for(max(ranks.values())))
    for name, (left, right) in pairs.items():
        a, b = factor_keys(name, is_embedding=kinds.get(name) is ChannelKind.EMBEDDING)
        tensors |= {a: _padded(right, ranks[name], 0), b: _padded(left, ranks[name], 1)}
    for name in whole:
        tensors |= _norm_tensors(name, modules[name], base)
    tensors |= token_tensors(modules, tokens, base)
    left_out = [name for name in modules if name not in {*ranks, *whole, *tokens}]
    if not biased:
        left_out += [f"{name}.bias" for name, module in factored.items() if module.bias is not None]
    gained = {name: float(modules[name].gains.sum()) for name in lost}
    errors = {name: value / gained[name] if gained[name] else 0.0 for name, value in lost.items()}
    errors |= dict.fromkeys(zeros, 0.0)
    error = sum(lost.values()) / (sum(gained.values()) or 1.0)
    is_tied = any(module.is_tied for module in embeddings.values())
    config = lora_config(
        ranks,
        known=[one for m in modules.values() for one in m.names] if facts is None else facts.known,
        whole=whole,
        task_type=record.task_type,
        base_model_name_or_path=record.base,
        lora_bias=biased,
        fan_in_fan_out=ChannelKind.CONV1D in kinds.values(),
        trainable_token_indices=token_indices(tokens),
        ensure_weight_tying=is_tied,
    )
    parts = [tensor_part(key, tensors[key]) for key in sorted(tensors)]
    if engine is None and facts is not None and facts.skeleton is not None:
        check_with_peft(config, infos_of(parts), facts.skeleton)
    lines = _card_lines(record, ranks, errors, error, left_out, is_tied=is_tied)
    write_folder(output, parts, config, lambda: card_text(record.base, lines), overwrite=overwrite)
    return FittedLora(output, MappingProxyType(ranks), MappingProxyType(errors), error, tuple(left_out))


def _padded(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """A factor in float32, filled up with zeros along one axis."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor.float(), torch.zeros(shape)], dim).contiguous()


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


def _norm_tensors(name: str, module: FittedModule, base: Parameters | None) -> Tensors:
    """`modules_to_save` stores whole modules, the base's weights included."""
    found = needed_base(base, name)
    every = torch.arange(len(module.delta))
    tensors = {}
    for part, change in (("weight", module.weight_change()), ("bias", module.bias)):
        if change is not None:
            values = found.rows(f"{name}.{part}", every, 0).cpu()
            tensors[whole_key(name, part)] = (values.to(wide_dtype(values.dtype)) + change).to(values.dtype)
    return tensors


def _card_lines(
    record: FitRecord,
    ranks: Mapping[str, int],
    errors: Mapping[str, float],
    error: float,
    left_out: Iterable[str],
    *,
    is_tied: bool,
) -> list[str]:
    donors = in_markdown(", ".join(name or "a model in memory" for name in record.donors))
    left = in_markdown(", ".join(left_out))
    return [
        "## LoRA adapter made from a fitted transfer\n",
        "Made with `act_peft.fit`: the part of the donor's difference that its inputs on the ability ask for, cut to",
        "a rank in the metric of these inputs. PEFT loads it as any LoRA adapter; act_peft is not needed.\n",
        f"- base: {in_markdown(record.base or 'unknown')}",
        f"- donor: {donors}",
        f"- share of the fitted gain that the rank loses: {error:.3g}",
        *([f"- fitted, but not in this adapter: {left}"] if left else []),
        *(["- use it unmerged: PEFT would add the change of the tied embedding twice"] if is_tied else []),
        "\n| module | rank | lost |\n|---|---|---|",
        *(f"| {in_markdown(name)} | {rank} | {_shown(errors.get(name))} |" for name, rank in ranks.items()),
    ]


def _shown(error: float | None) -> str:
    return "as the embedding" if error is None else f"{error:.3g}"
