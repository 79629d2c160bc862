"""Fixtures that several test files share; every fixture hands out a fresh copy."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import DTYPES, FAMILIES


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are quicker, and their sums reproducible, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param
