"""The processes of one distributed run: what each says, and sums over all of them.

A collective operation waits for every process. A user may call something on one process alone, so whatever begins
here first meets the others at the store of the process group, with limited patience.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import distributed

from act_peft.doors import default_store
from act_peft.errors import ActValueError, ActWarning

_PREFIX = "act_peft"
_PATIENCE = 60.0  # seconds for functions that read data: processes load models at different speeds
_PAUSE = 0.01  # seconds between two looks at the store
_logger = logging.getLogger(__name__)

_rounds: Counter[str] = Counter()  # how often this process was at each meeting place
_missed: set[str] = set()  # meeting places at which others did not come, where nobody is waited for again


def num_processes() -> int:
    """Number of processes of the run; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


def meet(topic: str, said: Any, *, seconds: float) -> list[Any] | None:
    """Exchange something with all other processes that come to the same place.

    No process waits longer than its patience. All of one round get the same answer: if one has lost its patience, the
    round is over for all, and a process that comes later begins the next one.

    Args:
        topic: name of the place.
        said: what this process says, JSON-serialisable.
        seconds: how long it waits for the others.

    Returns:
        What every process said, by their numbers; None if not all have come.
    """
    store, size = default_store(), num_processes()
    if store is None:
        return None
    while True:
        place = f"{_PREFIX}/{topic}/{_rounds[topic]}"
        _rounds[topic] += 1
        if not (store.check([f"{place}/end"]) and store.get(f"{place}/end") == b"given up"):
            break
    store.set(f"{place}/{process_index()}", json.dumps(said))
    if store.add(f"{place}/count", 1) == size:
        store.compare_set(f"{place}/end", "", "complete")
    last = time.monotonic() + seconds
    while not store.check([f"{place}/end"]) and time.monotonic() < last:  # `wait` would print when the time is over
        time.sleep(_PAUSE)
    store.compare_set(f"{place}/end", "", "given up")
    if store.get(f"{place}/end") != b"complete":
        return None
    return [json.loads(store.get(f"{place}/{number}")) for number in range(size)]


def all_begin(function: str, settings: Any, *, stacklevel: int) -> bool:
    """Whether all processes of a distributed run have called a function now; False for a single process.

    Args:
        function: its name.
        settings: what must be the same in all of them, JSON-serialisable.
        stacklevel: as in `warnings.warn`, counted from the caller.

    Raises:
        ActValueError: the settings differ.

    Warns:
        ActWarning: some do not come.
    """
    if num_processes() == 1:
        return False
    every = meet(function, settings, seconds=_PATIENCE)
    if every is None:
        warnings.warn(
            f"{function}: not all {num_processes()} processes have called it within {_PATIENCE:.0f} s, so the result "
            f"is that of the batches of process {process_index()} alone (call it in all of them, or in one and load "
            "what it saves in the others)",
            ActWarning,
            stacklevel=stacklevel + 1,
        )
        return False
    for number, theirs in enumerate(every):
        if theirs != every[0]:
            raise ActValueError(
                f"{function}: process {number} has {theirs}, process 0 {every[0]}, expected the same models and "
                "settings in all processes"
            )
    return True


def check_equal(topic: str, mine: Mapping[str, str], *, what: str, advice: str, seconds: float) -> None:
    """Check that all processes hold the same; those that do not come are not waited for again.

    Args:
        topic: name of the place where they meet.
        mine: name -> digest of what this process holds.
        what: the things that are compared, for the message.
        advice: what to do, for the message.
        seconds: how long this process waits for the others.

    Raises:
        ActValueError: they differ. All processes that came raise it.
    """
    if num_processes() == 1:
        return
    every = meet(topic, dict(mine), seconds=0.01 if topic in _missed else seconds)
    if every is None:
        _missed.add(topic)
        _logger.info("%s: not all %d processes have come, so %s are not compared", topic, num_processes(), what)
        return
    others = [number for number, theirs in enumerate(every) if theirs != every[0]]
    if others:
        first = every[others[0]]
        names = [name for name in {**every[0], **first} if every[0].get(name) != first.get(name)]
        raise ActValueError(
            f"{names[0]}: process {others[0]} has other {what} than process 0, expected the same in all "
            f"{len(every)} processes ({len(others)} of them differ from process 0, in {len(names)} of "
            f"{len({**every[0], **first})} modules; {advice})"
        )


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes, with one operation. All processes must call this.

    Args:
        tensors: float64 tensors on the CPU, of the same shapes in every process.
    """
    if num_processes() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(_device_of_group())
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.cpu().split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process. All processes must call this."""
    if num_processes() == 1:
        return flag
    found = torch.tensor([int(flag)], device=_device_of_group())
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return bool(found.item())


def gather(objects: list[Any]) -> list[Any]:
    """The objects of all processes, the first of each first; all processes must call this.

    Args:
        objects: what this process has; tensors on the CPU.
    """
    if num_processes() == 1:
        return objects
    every: list[Any] = [None] * num_processes()
    distributed.all_gather_object(every, objects)
    return [part[number] for number in range(max(map(len, every))) for part in every if number < len(part)]


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> a short digest of an int64 tensor; tensors without data are left out."""
    with_data = {name: tensor for name, tensor in tensors.items() if tensor.device.type != "meta"}
    return {name: sha256(t.detach().cpu().numpy().tobytes()).hexdigest()[:16] for name, t in with_data.items()}


def _device_of_group() -> torch.device:
    """A device whose tensors the process group can add."""
    if distributed.get_backend() in ("gloo", "mpi"):
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    if device is None:
        return torch.device("cpu")
    return torch.device(device.type, torch.accelerator.current_device_index())
