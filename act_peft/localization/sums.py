"""Running sums per channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from act_peft.errors import ActValueError
from act_peft.processes import sum_over_processes

# Number of elements in one block: on the CPU it fits the cache, on an accelerator it is large enough to be fast.
_CPU_ELEMENTS = 1 << 17
_ACCELERATOR_ELEMENTS = 1 << 26


def sum_absolute_difference(
    donor: torch.Tensor, base: torch.Tensor, samples: torch.Tensor, count: int
) -> torch.Tensor:
    """`sum over the rows of each sample of |donor - base|`, on the donor's device.

    The difference is computed in float32 or wider, the sum in float64 (float32 where a device has no float64).

    Args:
        donor: `[R, C]`, any floating dtype. May be overwritten.
        base: `[R, C]`, any floating dtype and device.
        samples: number of the sample of every row, int64 `[R]`.
        count: number of samples B.

    Returns:
        `[B, C]`.
    """
    device, wide = donor.device, torch.promote_types(torch.promote_types(donor.dtype, base.dtype), torch.float32)
    total = torch.zeros(count, donor.shape[1], device=device, dtype=_sum_dtype(device))
    number = torch.arange(count, device=device)[:, None]  # [B, 1]
    samples = samples.to(device)
    for rows in _blocks(donor):
        difference = donor[rows].to(wide).sub_(base[rows].to(device, wide)).abs_()  # [R, C]
        total.addmm_((samples[rows] == number).to(total.dtype), difference.to(total.dtype))
    return total


def sum_per_channel(
    formula: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], *, channel_dim: int
) -> torch.Tensor:
    """`sum of formula(*tensors)` over every axis except that of the channels, one block of rows at a time.

    The formula is computed in float32 or wider, the sum in float64 (float32 where a device has no float64).

    Args:
        formula: an elementwise function of blocks of the tensors. Blocks of the wide dtype are no copies.
        tensors: `[R, C]`, `[C, I]` or `[C]`, of one shape, any floating dtypes and devices.
        channel_dim: axis of the channels, 0 or 1.

    Returns:
        `[C]`, on the device of the first tensor.
    """
    first = tensors[0]
    device, shape = first.device, first.shape
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    total = torch.zeros(shape[channel_dim], device=device, dtype=_sum_dtype(device))
    for rows in _blocks(first):
        values = formula(*(tensor[rows].to(device=device, dtype=wide) for tensor in tensors))  # [rows, ...]
        if channel_dim == 0:
            total[rows] = values.flatten(1).sum(1, dtype=total.dtype) if values.dim() > 1 else values
        else:
            total += values.sum(0, dtype=total.dtype)
    return total


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """The rows of a tensor in blocks."""
    elements = _CPU_ELEMENTS if tensor.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    rows = max(elements // max(math.prod(tensor.shape[1:]), 1), 1)
    for start in range(0, tensor.shape[0], rows):
        yield slice(start, start + rows)


class ChannelSums:
    """Sums per channel and the number of their tokens, over all batches so far.

    Args:
        num_channels: module name -> number of channels C.
        what: the values in the sums, for messages.
    """

    def __init__(self, num_channels: Mapping[str, int], *, what: str = "activations whose difference is") -> None:
        self._what = what
        self._sums = {
            name: torch.zeros(count, dtype=torch.float64, device="cpu") for name, count in num_channels.items()
        }
        self._num_tokens = torch.zeros((), dtype=torch.int64, device="cpu")

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """Module name -> float64 `[C]` on the CPU."""
        return dict(self._sums)

    @property
    def num_tokens(self) -> int:
        """Number of tokens summed."""
        return int(self._num_tokens)

    def add_(self, batch: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        """Add the sums of one batch.

        Args:
            batch: module name -> `[C]`, for every module, on any devices.
            num_tokens: number of tokens in these sums.

        Raises:
            ActValueError: a sum is not finite. Then nothing is added.
        """
        on_cpu = _to_cpu(batch)
        wrong = [name for name, values in on_cpu.items() if not torch.isfinite(values).all()]
        if wrong:
            raise ActValueError(
                f"{wrong[0]}: got {self._what} not finite (NaN or infinite), expected finite "
                f"numbers ({len(wrong)} of {len(on_cpu)} modules; float16 overflows easily, load both models in "
                "bfloat16 or float32)"
            )
        for name, values in self._sums.items():
            values += on_cpu[name]
        self._num_tokens += num_tokens

    def put_(self, sums: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        """Go on from the sums of an earlier run over the same channels; they may be followed by zeros."""
        for name, values in self._sums.items():
            values.copy_(sums[name][: values.numel()])
        self._num_tokens.fill_(num_tokens)

    def gather_(self) -> None:
        """Replace sums and number by those of all processes together; all of them must call this."""
        tokens = self._num_tokens.double()
        sum_over_processes([*self._sums.values(), tokens])
        self._num_tokens.copy_(tokens)


def _to_cpu(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move many small tensors with one copy per device, because every copy waits for the device."""
    moved: dict[str, torch.Tensor] = {}
    for device in {values.device for values in sums.values()}:
        names = [name for name, values in sums.items() if values.device == device]
        together = torch.cat([sums[name] for name in names]).cpu()
        moved.update(zip(names, together.split([sums[name].numel() for name in names]), strict=True))
    return {name: moved[name] for name in sums}
