"""Checks of the sums that scores are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from act_peft.checks import module_name, whole_number
from act_peft.errors import ActTypeError, ActValueError


def rows_of(tensors: Mapping[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """The rows of every tensor of a file that has several a module, row by row.

    Raises:
        ActValueError: a tensor with a different number of rows.
    """
    for name, values in tensors.items():
        if values.dim() != 2 or values.shape[0] != count:
            raise ActValueError(
                f"{name}: got sums of shape {list(values.shape)}, expected [{count}, C] (save them again)"
            )
    return [{name: values[row] for name, values in tensors.items()} for row in range(count)]


def checked_sums(name: str, values: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """A float64 copy `[C]` of one module's sums.

    Raises:
        ActTypeError: a name that is no str, values that are no floating tensor `[C]`.
        ActValueError: values that are not finite; negative ones, unless they are `signed`.
    """
    name = module_name(name)
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise ActTypeError(f"{name}: got {got}, expected a floating point tensor [C]")
    if values.dim() != 1 or values.numel() == 0:
        raise ActTypeError(f"{name}: got sums of shape {list(values.shape)}, expected [C]")
    values = values.detach().to(device="cpu", dtype=torch.float64, copy=True)
    wrong = ~torch.isfinite(values)
    if not signed:
        wrong |= values < 0
    wrong = wrong.nonzero()
    if wrong.numel():
        channel = int(wrong[0])
        raise ActValueError(
            f"{name}: got {float(values[channel])} for channel {channel}, expected finite sums"
            f"{'' if signed else ' of absolute differences'} ({len(wrong)} of {values.numel()} "
            "channels are wrong)"
        )
    return values


def checked_comparable(sums: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> dict[str, int]:
    """The counts of the modules with channels that are not comparable.

    Raises:
        ActTypeError: a count that is no int.
        ActValueError: a module without sums, a count out of range, a sum other than 0 behind the comparable channels.
    """
    for name, count in counts.items():
        if name not in sums:
            raise ActValueError(f"num_comparable: {name} is not a module of these scores")
        count = whole_number(count, f"{name}: number of comparable channels", least=1, most=sums[name].numel())
        if sums[name][count:].any():
            raise ActValueError(
                f"{name}: got a score other than 0 for a channel after the {count} comparable ones, expected 0"
            )
    return {name: count for name, count in counts.items() if count < sums[name].numel()}


def count_text(count: int | None) -> str:
    """A module's number of channels in words."""
    return "no such module" if count is None else f"{count} channels"
