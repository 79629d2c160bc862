"""Evaluation mode for a while, without lasting effects on models and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Inside the context the models are in evaluation mode and no gradients are recorded.

    Afterwards every submodule has its own training flag again, also in a model that was partly in training mode. The
    global random number generators of the CPU and of the models' CUDA devices are restored too, because a shuffled
    dataloader draws from them.
    """
    # The flags are set directly: `eval()` may be overridden and do more, such as merging adapters.
    flags = [(module, module.training) for model in models for module in model.modules()]
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
