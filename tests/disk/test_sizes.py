"""Numbers of a stranger's configuration do not have a model built without end."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from torch import nn

from act_peft import ActValueError, create_adapter
from act_peft.disk import sizes
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.sizes import limited_parameters
from tests.support.tiny_models import build, random_mask

ENDLESS = {
    "layers": {"num_hidden_layers": 10**9},
    "thousands of layers": {"num_hidden_layers": 4000},
    "experts": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 10**9},
    "labels": {"num_labels": 10**9},
    "width": {"hidden_size": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "positions": {"max_position_embeddings": 10**12},
    "a part": {"vision_config": {"depths": [2, 10**9]}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "base"
    build("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("what", ENDLESS)
def test_a_model_without_end_is_refused(base, tmp_path, what):
    folder = tmp_path / "base"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **ENDLESS[what]}))
    started = time.process_time()
    message = r"config\.json (says \w+ = \d+, expected at most \d+|describes a model with more than \d+ parameters)"
    with pytest.raises(ActValueError, match=message):
        create_adapter(folder, base, random_mask(build("llama"), 0.2), tmp_path / "out")
    assert time.process_time() - started < 20
    assert not (tmp_path / "out").exists()


def test_usual_numbers_are_none(base):
    with Checkpoint.open(base) as checkpoint:
        usual = {
            "rope_theta": 10**9,
            "max_position_embeddings": 10_485_760,
            "eos_token_id": [151_645, 10**9],
            "hidden_size": 16_384,
            "num_experts": 512,
            "tokenizer_model_max_length": 10**30,
            "use_cache": True,
            "label2id": {"stagecoach": 20_000},
        }
        checkpoint.__dict__["config"] = usual
        sizes.check_sizes(checkpoint)


def test_only_the_own_thread_is_counted_and_nothing_stays(base, monkeypatch):
    monkeypatch.setattr(sizes, "_COUNTED", 1)
    monkeypatch.setattr(sizes, "_TIMES", 0)
    with Checkpoint.open(base) as checkpoint, limited_parameters(checkpoint):
        nn.Linear(2, 2, bias=False)
        with pytest.raises(ActValueError, match=re.escape("more than 1 parameters")):
            nn.Linear(2, 2, bias=False)
        with torch.device("meta"), pytest.raises(ActValueError, match="more than 1 parameters"):
            nn.Linear(2, 2, bias=False)
    nn.Linear(2, 2)
