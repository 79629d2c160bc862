"""What a setting adds to the parameters of the base, for rules of weights and for fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from act_peft.channels.kinds import ChannelKind, weight_of
from act_peft.channels.rows import wide_dtype
from act_peft.fitting import FittedTransfer
from act_peft.fitting.lora import embedding_factors, factors
from act_peft.fitting.pair import FittedPair
from act_peft.fitting.selection import top_tokens
from act_peft.sweeps.weight_rules import WeightRule

_BLOCK = 1 << 23  # numbers of a difference that are in float64 at the same time

Change = tuple[str, torch.Tensor]


def parameters_of(pairs: Sequence[FittedPair]) -> list[str]:
    """Names of the parameters of these modules."""
    return [f"{pair.name}.{part}" for pair in pairs for part in ("weight", *(["bias"] if pair.has_bias else []))]


def rule_changes(pairs: Sequence[FittedPair], rule: WeightRule) -> Iterator[Change]:
    """What a rule adds, module by module; the base must hold its own weights when a module's turn comes."""
    for pair in pairs:
        wide = wide_dtype(weight_of(pair.base).dtype)
        step = max(_BLOCK // pair.width, 1)
        blocks = [pair.differences(slice(at, at + step))[0].to(wide) for at in range(0, pair.num_rows, step)]
        rows = torch.cat(blocks)  # [R, I], or [R, I + 1] with the bias
        del blocks
        weight = rows[:, : pair.width] if not pair.kind.is_norm else rows[:, 0]
        if pair.kind is ChannelKind.CONV1D:
            weight = weight.T
        changes = {"weight": weight, **({"bias": rows[:, -1]} if pair.has_bias else {})}
        for part, difference in changes.items():
            yield f"{pair.name}.{part}", rule(f"{pair.name}.{part}", difference)


def rule_channels(pairs: Sequence[FittedPair], rule: WeightRule) -> int:
    """How many channels (of an embedding: tokens) a rule moves: all of the modules that it moves at all."""
    ones = torch.ones(256)  # so many that DARE keeps some of them
    return sum(pair.num_rows for pair in pairs if bool(rule(f"{pair.name}.weight", ones).any()))


def all_changes(fitted: FittedTransfer) -> Iterator[Change]:
    """All changes of a fit, as `FittedTransfer.merge` adds them."""
    for name, module in fitted.modules.items():
        yield from _of_module(name, module.weight_change(), module.bias)


def row_changes(fitted: FittedTransfer, share: float) -> tuple[Iterator[Change], int]:
    """The changes of the rows with the greatest gains, as `FittedTransfer.to_adapter` takes them.

    Args:
        fitted: the fit.
        share: of the channels of every module, and of the tokens.

    Returns:
        The changes, and the number of rows.
    """
    found = {name: top_tokens(module, share) for name, module in fitted.modules.items() if module.is_embedding}
    if len(found) < len(fitted.modules):
        found |= dict(fitted.gains.top(share, scope="module"))

    def changes() -> Iterator[Change]:
        for name, index in found.items():
            module = fitted.modules[name]
            outside = torch.ones(len(module.delta), dtype=torch.bool)
            outside[index] = False
            delta = module.delta.clone()
            delta[outside] = 0
            bias = None if module.bias is None else module.bias * ~outside
            part = replace(module, delta=delta, bias=bias)
            yield from _of_module(name, part.weight_change(), part.bias)

    return changes(), sum(index.numel() for index in found.values())


def rank_changes(
    fitted: FittedTransfer, rank: int, *, tokens: float = 0.0, embedding_rank: int | None = None
) -> tuple[Iterator[Change], int]:
    """The changes of a given rank, as `FittedTransfer.to_lora` takes them, the norms with them.

    Args:
        fitted: the fit, with `max_rank` at least as high.
        rank: of the linear modules.
        tokens: share of the tokens that move.
        embedding_rank: rank of embeddings, in place of `tokens`.

    Returns:
        The changes, and the number of rows that they change.
    """
    linear = [module for module in fitted.modules.values() if module.is_linear]
    # PEFT has biases in all of them or in none, and none beside factors of an embedding.
    biased = embedding_rank is None and all(module.bias is not None for module in linear)
    share = tokens if embedding_rank is None else 1.0
    rows = {name: top_tokens(module, share) for name, module in fitted.modules.items() if module.is_embedding}

    def changes() -> Iterator[Change]:
        for name, module in fitted.modules.items():
            if module.is_embedding and embedding_rank is not None:
                left, right, _ = embedding_factors(module, embedding_rank)
                yield from _of_module(name, left @ right, None)
            elif module.is_embedding:
                weight = torch.zeros_like(module.delta)
                weight[rows[name]] = module.delta[rows[name]]
                yield from _of_module(name, weight, None)
            elif module.is_linear:
                left, right, bias = factors(name, module, rank)
                weight = left @ right
                weight = weight.T if module.kind is ChannelKind.CONV1D else weight
                yield from _of_module(name, weight, bias if biased else None)
            else:
                yield from _of_module(name, module.weight_change(), module.bias)

    whole = sum(len(module.delta) for module in fitted.modules.values() if not module.is_embedding)
    return changes(), whole + sum(index.numel() for index in rows.values())


def _of_module(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[Change]:
    yield f"{name}.weight", weight
    if bias is not None:
        yield f"{name}.bias", bias
