from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.support.tiny_models import FAMILIES, VOCABULARY, build


def batches(*, seed: int, rows: int = 3, length: int = 7, labels: bool = False) -> list[dict[str, torch.Tensor]]:
    """Two batches with padding on the right."""
    found = []
    for number in range(2):
        generator = torch.Generator().manual_seed(seed + number)
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch["labels"] = torch.where(torch.arange(length) > 2, ids, -100)
        found.append(batch)
    return found


def relatives(family: str, *, dtype: torch.dtype = torch.float64, donors: int = 1) -> list[nn.Module]:
    """A base and donors, not quite as small steps apart as real ones."""
    models = []
    for number in range(donors + 1):
        model = build(family, dtype=dtype)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.02 * bool(number))
        models.append(model)
    return models


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair() -> Callable[..., list[nn.Module]]:
    return relatives
