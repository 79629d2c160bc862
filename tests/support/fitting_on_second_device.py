"""Fits of models on a second device. `fitting/test_devices.py` runs this file in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from act_peft import ActConfig, fit
from tests.fitting.conftest import batches, relatives
from tests.support.second_device import OTHER

ABILITY, KEEP = batches(seed=0), batches(seed=10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("of_base", "of_donor"), [(OTHER, OTHER), (OTHER, "cpu"), ("cpu", OTHER)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_fit_is_the_same_everywhere(family, of_base, of_donor, tokens):
    base, donor = relatives(family)
    few = [{name: value[:, :tokens] for name, value in batch.items()} for batch in ABILITY]
    expected = fit(base, donor, few, KEEP, max_rank=4)
    for model, device in ((base, of_base), (donor, of_donor)):
        model.to(device).tie_weights()  # moving to this device unties
    found = fit(base, donor, few, KEEP, max_rank=4)
    for name, module in expected.modules.items():
        other = found.modules[name]
        assert other.fingerprint == module.fingerprint
        for part in ("delta", "bias", "gains", "strengths"):
            if getattr(module, part) is not None:
                assert getattr(other, part).device.type == "cpu"
                torch.testing.assert_close(getattr(other, part), getattr(module, part))


@pytest.mark.parametrize(
    "config",
    [
        ActConfig(channels={"q_proj": [0, 3], "norm": [2]}, task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["norm"], trainable_token_indices=[3]),
    ],
)
def test_adapters_are_filled_where_they_are(config):
    base, donor = relatives("llama", dtype=torch.float32)
    fitted = fit(base, donor, ABILITY, KEEP)
    expected = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).to(OTHER)
    fitted.apply_to(expected)
    fitted.apply_to(model)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(mine.detach().cpu(), theirs.detach(), msg=name)
    fitted.add_to_(base.to(OTHER))
