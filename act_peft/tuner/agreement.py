"""All processes of a distributed run adapt and train the same channels."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from act_peft.errors import ActValueError
from act_peft.processes import check_equal, digests, num_processes

_ADVICE = (
    "make the mask in all processes from the same scores, as localize gives them there; or save it in one process and "
    "load it in all"
)
_ONE_HAS_WEIGHTS = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate and transformers tell each other this way
# Seconds. Whoever makes an adapter in one process alone waits the first time; a training step begins everywhere.
_CREATION_PATIENCE, _TRAINING_PATIENCE = 10.0, 60.0


def check_loading() -> None:
    """Refuse a run in which only one process has the base's weights, because the rows are read in all of them.

    Raises:
        ActValueError: `cpu_ram_efficient_loading` of FSDP is on.
    """
    if num_processes() > 1 and os.environ.get(_ONE_HAS_WEIGHTS, "").lower() in ("true", "1"):
        raise ActValueError(
            "cpu_ram_efficient_loading: is on, so that only one process has the base's weights, expected them in all "
            "(set it to False in fsdp_config, or FSDP_CPU_RAM_EFFICIENT_LOADING=false; FSDP2 spreads the weights then)"
        )


def check_channels(indices: Mapping[str, torch.Tensor]) -> None:
    """Compare the channels of a new adapter with those in all other processes that make one now.

    Args:
        indices: module name -> channels, int64 `[K]`.

    Raises:
        ActValueError: they differ.
    """
    check_equal("adapter", digests(indices), what="channels", advice=_ADVICE, seconds=_CREATION_PATIENCE)


def check_training(held: Mapping[str, str]) -> None:
    """Compare the channels that this process is about to train with those of all others.

    Args:
        held: name of a module and its adapter -> digest of its channels.

    Raises:
        ActValueError: they differ.
    """
    check_equal("training step", held, what="channels", advice=_ADVICE, seconds=_TRAINING_PATIENCE)
