"""Which rows of a module's output belong to the answer tokens."""

from __future__ import annotations

from typing import Any

import torch

from act_peft.errors import ActValueError
from act_peft.localize.answer_tokens import AnswerTokens


def select_rows(
    output: torch.Tensor, args: tuple[Any, ...], tokens: AnswerTokens, *, channels: int, positional: bool
) -> torch.Tensor:
    """Copy the rows of the answer tokens out of a module's output.

    | output | rows |
    |---|---|
    | `[B, T, C]`, `[B*T, C]` | one per token |
    | `[B, T, heads, C]`, `[B, heads, T, C]` (query and key norms) | `heads` per token |
    | `[1, T, C]`, `[T, C]` of an embedding (positions, the same for every sample) | one per token |

    Args:
        output: what the module returned.
        args: what the module was called with; tells the two layouts with heads apart if there are as many heads as
            tokens.
        tokens: the N answer tokens of the batch `[B, T]`.
        channels: C.
        positional: whether an output without the batch's axis may be repeated for every sample.

    Returns:
        `[N * R, C]`, a copy; R rows for every token.

    Raises:
        ActValueError: the output has no row for every token.
    """
    size, length = tokens.batch_size, tokens.length
    if not isinstance(output, torch.Tensor):
        raise ActValueError(f"got an output of type {type(output).__name__}, expected a tensor")
    shape = tuple(output.shape)
    index = tokens.index_on(output.device)
    if shape in ((size, length, channels), (size * length, channels)):
        return output.reshape(size * length, channels).index_select(0, index)
    if positional and shape in ((1, length, channels), (length, channels)):
        return output.reshape(length, channels).index_select(0, index % length)
    if len(shape) == 4 and shape[0] == size and shape[3] == channels and length in shape[1:3]:
        by_token = output.transpose(1, 2) if _heads_first(shape, args, length) else output
        return by_token[index // length, index % length].flatten(0, 1)  # [N, heads, C] -> [N * heads, C]
    raise ActValueError(
        f"got an output of shape {list(shape)}, expected one row of {channels} channels for each of the "
        f"{size} x {length} tokens"
    )


def _heads_first(shape: tuple[int, ...], args: tuple[Any, ...], length: int) -> bool:
    if shape[1] != shape[2]:
        return shape[2] == length
    # As many heads as tokens: heads are split off the last axis of [B, T, heads * C], so in memory they lie closer
    # together than tokens do.
    given = args[0] if args and isinstance(args[0], torch.Tensor) else None
    return given is not None and given.dim() == 4 and given.stride(1) < given.stride(2)
