from __future__ import annotations

import json

import pytest
import torch

from act_peft import ActConfig, ChannelMask
from act_peft.demo.family import BASE
from tests.support.figures import make_loss_sweep, make_patching, make_scores, make_sweep


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """A folder with a file of each kind."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("shown")
    scores = make_scores()
    scores.save(folder / "scores.safetensors")
    make_scores(seed=1).save(folder / "again.safetensors")
    counts = scores.num_channels
    scores.top(0.1, scope="module").save(folder / "mask.safetensors")
    ChannelMask({"lm_head": range(200), "model.layers.0.mlp.up_proj": [1]}, counts).save(folder / "head.safetensors")
    (folder / "patching.json").write_text(json.dumps(make_patching().to_dict()))
    (folder / "sweep.json").write_text(json.dumps(make_sweep().to_dict()))
    (folder / "losses.json").write_text(json.dumps(make_loss_sweep().to_dict()))
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = ActConfig(channels={"up_proj": [0, 3, 5]}, trainable="scales", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "channel_scale" in name:
                parameter.copy_(torch.tensor([0.0, 0.4, 1.0]))
    adapted.save_pretrained(folder / "adapter")
    return folder
