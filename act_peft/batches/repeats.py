"""Batches of a dataloader that is spread over processes, without the samples that it gives twice.

So that every process gets equally many batches, such loaders repeat samples at the end.

| loader | how it repeats | what is done |
|---|---|---|
| accelerate, over a dataset | its batch sampler does, if `even_batches` | that is switched off for a while |
| accelerate, over a stream | it completes the last batch; `remainder` says how many are new | the last batch is cut |
| torch's `DistributedSampler` | it completes the list of samples | the last batch is cut |
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from act_peft.errors import ActWarning
from act_peft.processes import gather, num_processes, process_index

Batch = Mapping[str, Any]


def without_repeats(dataloader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of this process, each sample once in all processes together.

    Args:
        dataloader: any iterable of batches.

    Warns:
        ActWarning: a stream of unknown length, whose last batch may hold repeated samples.
    """
    loader: Any = dataloader
    evened: Any = getattr(loader, "batch_sampler", None)
    if num_processes() == 1:
        yield from dataloader
    elif getattr(evened, "even_batches", False):
        evened.even_batches = False
        try:
            yield from dataloader
        finally:
            evened.even_batches = True
    elif isinstance(getattr(loader, "sampler", None), DistributedSampler):
        yield from _first_samples(dataloader, _own_samples(loader.sampler))
    elif hasattr(loader, "end_of_dataloader") and hasattr(loader, "remainder") and not _is_uneven(evened):
        for batch in dataloader:
            yield from _first_samples(
                [batch], _new_samples(loader, _size(batch)) if loader.end_of_dataloader else None
            )
    else:
        yield from dataloader


def batches_of_all(dataloader: Iterable[Batch], *, together: bool) -> list[Batch]:
    """The batches of all processes, each sample once; those of this process if they do not come together.

    Args:
        dataloader: any iterable of batches.
        together: whether all processes call this now.
    """
    if not together:
        return list(dataloader)
    return gather([_on_cpu(batch) for batch in without_repeats(dataloader)])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_cpu(part) for name, part in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _is_uneven(batch_sampler: Any) -> bool:
    """Whether a batch sampler of accelerate gives every sample once, because it was asked to."""
    return hasattr(batch_sampler, "even_batches") and not batch_sampler.even_batches


def _own_samples(sampler: Any) -> int:
    """How many samples of a `DistributedSampler`'s process are no repetitions."""
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))


def _new_samples(loader: Any, size: int) -> int | None:
    """How many samples of this process's last batch are no repetitions; None for all."""
    if loader.remainder < 0:
        warnings.warn(
            "dataloader: has no length, so the samples that it repeats in its last batch are counted twice (take "
            "dispatch_batches=True, or a dataset with a length)",
            ActWarning,
            stacklevel=2,
        )
    if loader.remainder <= 0:
        return None
    return min(max(loader.remainder - process_index() * size, 0), size)


def _first_samples(batches: Iterable[Batch], count: int | None) -> Iterator[Batch]:
    """The first `count` samples of some batches; all of them if it is None."""
    for batch in batches:
        size = _size(batch)
        if count is None or size <= count:
            yield batch
        elif count:
            yield {name: value[:count] if _length(value) == size else value for name, value in batch.items()}
        count = None if count is None else max(count - size, 0)


def _size(batch: Batch) -> int:
    """Number of samples of a batch."""
    return next((length for value in batch.values() if (length := _length(value))), 0)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, torch.Tensor) and value.dim() else 0
