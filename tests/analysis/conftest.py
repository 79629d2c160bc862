from __future__ import annotations

import pytest
import torch

from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from tests.support.pairs import batches, collate, pair, samples

__all__ = ["batches", "collate", "pair", "samples"]

KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def random_scores():
    """A function that draws heavy-tailed scores of a small model: random_scores(seed, layers=3, channels=20)."""

    def draw(seed=0, *, layers=3, channels=20, kind="activation"):
        generator = torch.Generator().manual_seed(seed)
        names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in KINDS] + ["lm_head"]
        sums = {name: torch.randn(channels + n, generator=generator).exp() for n, name in enumerate(names)}
        return ChannelScores(sums, 0 if kind == "weight" else 7, kind=kind)

    return draw


@pytest.fixture
def random_mask():
    """A function that draws a mask with given numbers of channels: random_mask(seed, {"a": (3, 10)})."""

    def draw(seed, counts):
        generator = torch.Generator().manual_seed(seed)
        return ChannelMask(
            {name: torch.randperm(size, generator=generator)[:few] for name, (few, size) in counts.items()},
            {name: size for name, (_, size) in counts.items()},
        )

    return draw
