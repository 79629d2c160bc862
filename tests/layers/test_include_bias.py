"""Channels without their biases: the biases stay the base's, in memory, on disk, merged, combined and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from act_peft import (
    ActConfig,
    ActLoadError,
    ActTypeError,
    combine,
    create_adapter,
    export_lora,
    initialize_from_donor,
    merge_checkpoint,
)
from tests.support.exports import config_of, tensors_of
from tests.support.tiny_models import batch, build_relatives

CHANNELS = {
    "qwen2": {"q_proj": [0, 3], "up_proj": [2]},
    "gpt2": {"c_fc": [1, 4], "ln_f": [2]},
}


@pytest.fixture(params=CHANNELS)
def saved(request, tmp_path):
    """The base, and an adapter of the donor's weights in its channels, in memory and in the folder `act`."""
    base, donor = build_relatives(request.param)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    config = ActConfig(channels=CHANNELS[request.param], include_bias=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    initialize_from_donor(model, donor, transfer_scale=1.0)
    model.save_pretrained(tmp_path / "act")
    return base, donor, model, CHANNELS[request.param]


def test_only_weights_move(saved, tmp_path):
    base, donor, model, _ = saved
    assert not [key for key in tensors_of(tmp_path / "act") if "bias" in key]
    assert config_of(tmp_path / "act")["include_bias"] is False
    expected = model(batch()).logits.detach()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(batch()).logits, expected)
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed
    assert not [name for name in changed if name.endswith("bias")]
    assert all((merged.get_parameter(name) == donor.get_parameter(name)).any() for name in changed)
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model.unload().named_parameters())


def test_files_are_as_good_as_memory(saved, tmp_path):
    base, _, model, channels = saved
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "act").eval()  # an ActWarning would be an error
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    merge_checkpoint(tmp_path / "base", tmp_path / "act", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    create_adapter(
        tmp_path / "base", tmp_path / "donor", channels, tmp_path / "made", transfer_scale=1.0, include_bias=False
    )
    made, mine = tensors_of(tmp_path / "made"), tensors_of(tmp_path / "act")
    assert made.keys() == mine.keys()
    assert all(torch.equal(made[key], mine[key]) for key in made)
    records = config_of(tmp_path / "made")["adapted_modules"]
    assert records == config_of(tmp_path / "act")["adapted_modules"]
    again = get_peft_model(copy.deepcopy(base), ActConfig(channels=channels, donor=str(tmp_path / "act")))
    again.save_pretrained(tmp_path / "again")
    for key, tensor in tensors_of(tmp_path / "again").items():
        if key in mine and "index" not in key:
            torch.testing.assert_close(tensor, 0.4 * mine[key])
        assert not key.endswith("bias") or not tensor.any()


def test_it_combines_with_an_adapter_that_moves_biases(saved, tmp_path):
    base, _, _, channels = saved
    other = get_peft_model(copy.deepcopy(base), ActConfig(channels=channels, donor=str(tmp_path / "donor")))
    other.save_pretrained(tmp_path / "other")
    combine([tmp_path / "act", tmp_path / "other"], tmp_path / "both", base=tmp_path / "base")
    both, with_bias = tensors_of(tmp_path / "both"), tensors_of(tmp_path / "other")
    assert both.keys() == with_bias.keys()
    assert all(torch.equal(both[key], with_bias[key]) for key in both if "delta_bias" in key)
    assert config_of(tmp_path / "both")["include_bias"] is True
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")


def test_learned_scales_go_together_with_it(saved, tmp_path):
    base, _, _, channels = saved
    config = ActConfig(channels=channels, donor=str(tmp_path / "donor"), include_bias=False, trainable="scales")
    model = get_peft_model(copy.deepcopy(base), config)
    assert not [name for name, _ in model.named_parameters() if "act_delta_bias" in name]
    assert torch.isfinite(model(batch()).logits).all()


def test_a_file_that_lost_its_biases_is_still_refused(saved, tmp_path):
    base, _, _, _ = saved
    path = tmp_path / "act" / "adapter_config.json"
    path.write_text(path.read_text().replace('"include_bias": false', '"include_bias": true'))
    with pytest.raises(ActLoadError, match="the adapter has no act_delta_bias"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "act")
    with pytest.raises(ActLoadError, match="has no deltas for the bias, the base has one"):
        merge_checkpoint(tmp_path / "base", tmp_path / "act", tmp_path / "merged")


def test_it_is_yes_or_no():
    with pytest.raises(ActTypeError, match="include_bias: got 'no', expected True or False"):
        ActConfig(include_bias="no")


def test_an_export_has_nothing_to_refuse(tmp_path):
    base, donor = build_relatives("qwen2")
    model = get_peft_model(base, ActConfig(channels={"q_proj": [0, 3]}, include_bias=False))
    initialize_from_donor(model, donor, transfer_scale=1.0)
    assert export_lora(model, tmp_path / "lora", target="vllm").error == 0
