"""A saved adapter."""

from __future__ import annotations

import pytest

from tests.support.exports import adapted
from tests.support.tiny_models import build


@pytest.fixture
def saved(tmp_path):
    """A model with an adapter of q_proj and down_proj, and the adapter's folder."""
    model = adapted(build("llama"), channels={"q_proj": [0, 3], "down_proj": list(range(16))})
    model.save_pretrained(tmp_path / "act")
    return model, tmp_path / "act"
