"""A fitted transfer whose changes are cut to a low rank."""

from __future__ import annotations

from dataclasses import replace

import torch

from act_peft.channels.rows import exact_arithmetic
from act_peft.fitting.lora import embedding_factors, factors
from act_peft.fitting.module import FittedModule, Modules


@exact_arithmetic()
def cut(modules: Modules, *, rank: int, embedding_rank: int | None) -> dict[str, FittedModule]:
    """The best changes of a rank; arguments and errors as `FittedTransfer.low_rank`.

    A row of the cut change gains what it has of the kept directions: with B A the change of rank r of Δ,

        gain_i = sum over k < r of (u_ik s_k)²            of a linear module
        gain_t = Δ_t M_t Δ_tᵀ - E_t M_t E_tᵀ,  E = Δ - B A     of an embedding
    """
    found = {}
    for name, module in modules.items():
        if module.is_linear:
            found[name] = _linear(name, module, rank)
        elif module.is_embedding and embedding_rank is not None:
            found[name] = _embedding(module, embedding_rank)
        else:
            found[name] = module
    return found


def _linear(name: str, module: FittedModule, rank: int) -> FittedModule:
    left, right, bias = factors(name, module, rank)
    strengths = torch.zeros_like(module.strengths)  # type: ignore[arg-type] # `factors` needs them
    kept = min(left.shape[1], len(strengths))
    strengths[:kept] = module.strengths[:kept]  # type: ignore[index]
    return replace(
        module,
        delta=(left @ right).to(module.delta.dtype),
        bias=None if module.bias is None or bias is None else bias.to(module.bias.dtype),
        gains=(left[:, :kept].double().square() @ strengths[:kept].square()),
        directions=left,
        strengths=strengths,
    )


def _embedding(module: FittedModule, rank: int) -> FittedModule:
    left, right, _ = embedding_factors(module, rank)
    delta = (left @ right).to(module.delta.dtype)
    gains = module.gains.clone()
    for start in range(0, len(delta), 4096):
        rows = slice(start, start + 4096)
        rest = module.delta[rows].double() - delta[rows].double()  # [r, H]
        gains[rows] -= ((rest @ module.token_metric) * rest).sum(1)  # type: ignore[operator]
        gains[rows] -= module.token_weights[rows] * rest.square().sum(1)  # type: ignore[index]
    return replace(module, delta=delta, gains=gains.clamp(min=0))
