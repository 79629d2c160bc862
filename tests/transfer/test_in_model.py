"""Transfer from a donor: the formula, the checks before it, and what is only worth a warning."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from act_peft import ActConfig, ActTypeError, ActValueError, ActWarning, initialize_from_donor
from act_peft.channels.kinds import channel_kind
from tests.support.tiny_models import batch, build, build_relatives, random_mask, state_bytes
from tests.support.unfit_donors import UNFIT_DONORS


def adapted(base, **settings):
    return get_peft_model(base, ActConfig(channels=random_mask(base, 0.3), task_type="CAUSAL_LM", **settings))


def test_deltas_are_the_scaled_difference_row_by_row(family, dtype):
    base, donor = build_relatives(family, dtype=dtype)
    plain = copy.deepcopy(base)
    model = adapted(base)
    initialize_from_donor(model, donor, transfer_scale=0.3)
    for name, index in random_mask(plain, 0.3).items():
        layer, mine, theirs = (m.get_submodule(name) for m in (model.get_base_model(), plain, donor))
        dim = channel_kind(mine).channel_dim
        delta = layer.act_delta_weight["default"]
        for position, channel in enumerate(index.tolist()):
            for i in range(mine.weight.shape[1 - dim] if mine.weight.dim() == 2 else 1):
                where = (channel,) if mine.weight.dim() == 1 else (channel, i) if dim == 0 else (i, channel)
                at = (position,) if mine.weight.dim() == 1 else (position, i) if dim == 0 else (i, position)
                expected = 0.3 * (theirs.weight[where].double() - mine.weight[where].double())
                assert abs(delta[at].item() - expected.item()) <= 1e-6 * max(1e-3, abs(expected.item()))
                if i == 3:  # four entries a channel say enough
                    break
        if getattr(mine, "bias", None) is not None:
            expected = 0.3 * (theirs.bias[index].float() - mine.bias[index].float())
            torch.testing.assert_close(layer.act_delta_bias["default"].detach(), expected)


def test_a_configuration_with_a_donor_does_the_same_as_the_function(family, tmp_path):
    base, donor = build_relatives(family)
    donor.save_pretrained(tmp_path)
    by_function = adapted(copy.deepcopy(base))
    initialize_from_donor(by_function, donor, transfer_scale=0.7)
    by_name = adapted(copy.deepcopy(base))
    initialize_from_donor(by_name, str(tmp_path), transfer_scale=0.7)
    by_config = adapted(base, donor=str(tmp_path), transfer_scale=0.7)
    for name, tensor in by_function.state_dict().items():
        assert torch.equal(by_config.state_dict()[name], tensor), name
        assert torch.equal(by_name.state_dict()[name], tensor), name
    assert by_name.peft_config["default"].donor == str(tmp_path)


def test_the_default_scale_is_the_configuration_s_and_the_used_one_is_recorded():
    base, donor = build_relatives("llama")
    model = adapted(base, transfer_scale=0.25)
    initialize_from_donor(model, donor)
    first = model.state_dict()["base_model.model.lm_head.act_delta_weight.default"].clone()
    initialize_from_donor(model, donor, transfer_scale=0.5)
    torch.testing.assert_close(model.state_dict()["base_model.model.lm_head.act_delta_weight.default"], 2 * first)
    assert model.peft_config["default"].transfer_scale == 0.5


def test_autocast_forgets_the_deltas_of_before():
    base, donor = build_relatives("llama")
    model, expected = adapted(copy.deepcopy(base)), adapted(base)
    ids = batch()
    initialize_from_donor(expected, donor, transfer_scale=0.7)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids).logits
        initialize_from_donor(model, donor, transfer_scale=0.7)
        found = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, expected(ids).logits)
    assert not torch.equal(found, before)


def test_a_second_adapter_is_filled_from_the_original_base_even_while_the_first_is_merged():
    base, donor = build_relatives("llama")
    plain = copy.deepcopy(base)
    model = adapted(base, init_weights=False)
    model.merge_adapter()
    mask = random_mask(plain, 0.3)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", ActConfig(channels=mask))
    model.merge_adapter()
    initialize_from_donor(model, donor, transfer_scale=1.0, adapter_name="second")
    delta = model.get_base_model().lm_head.act_delta_weight["second"]
    expected = donor.lm_head.weight[mask["lm_head"]] - plain.lm_head.weight[mask["lm_head"]]
    assert torch.equal(delta, expected)


def refused(model, donor, match, error=ActValueError, **settings):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        initialize_from_donor(model, donor, **settings)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("what", UNFIT_DONORS)
def test_donors_that_do_not_fit_are_refused(what):
    make, match = UNFIT_DONORS[what]
    refused(adapted(build("llama")), make(), match)


@pytest.mark.parametrize("what", UNFIT_DONORS)
def test_a_configuration_with_a_donor_that_does_not_fit_leaves_the_base_alone(what, tmp_path):
    make, match = UNFIT_DONORS[what]
    make().save_pretrained(tmp_path)
    base = build("llama")
    before, structure = state_bytes(base), [n for n, _ in base.named_modules()]
    with pytest.raises(ActValueError, match=match):
        adapted(base, donor=str(tmp_path))
    assert state_bytes(base) == before
    assert [n for n, _ in base.named_modules()] == structure


def test_other_bad_input_is_refused(tmp_path):
    base, donor = build_relatives("llama")
    refused(build("llama"), donor, "LlamaForCausalLM: has no ACT adapter 'default', expected one")
    model = adapted(base)
    refused(model, donor, "has no ACT adapter 'other'", adapter_name="other")
    refused(model, donor, "transfer_scale: got inf, expected a finite number", transfer_scale=float("inf"))
    refused(model, 3, "donor: got int, expected a model", ActTypeError)
    refused(model, str(tmp_path / "nowhere"), "cannot be opened, expected a folder with a checkpoint, or a Hub id")
    refused(model, str(tmp_path), "has neither model.safetensors nor .*, expected a folder with a checkpoint")
    (tmp_path / "file").write_text("x")
    refused(model, str(tmp_path / "file"), "got a file, expected a folder")
    model.merge_adapter()
    refused(model, donor, "adapter 'default' is merged, expected an unmerged one")


def test_a_checkpoint_without_all_tensors_is_refused(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(adapted(base), str(tmp_path), r"layers\.0\.mlp\.up_proj: donor has no weight, the base has weight")


def test_pickled_donors_are_not_read(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(donor.state_dict(), tmp_path / "pytorch_model.bin")
    refused(adapted(base), str(tmp_path), r"got pickled weights \(pytorch_model.bin\), expected safetensors")


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_base_may_be_any_module(tmp_path, on_disk):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), ActConfig(channels={"0": [1]}))
    donor = nn.Sequential(nn.Linear(4, 3))
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(ActWarning, match="no common ancestor"):
        initialize_from_donor(model, str(tmp_path) if on_disk else donor, transfer_scale=1.0)
    delta = model.base_model.model[0].act_delta_weight["default"]
    torch.testing.assert_close(delta[0].detach(), donor[0].weight[1].detach() - model.base_model.model[0].weight[1])


def test_harmless_differences_are_one_warning():
    base = build("llama")
    donor = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, max_position_embeddings=128)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.mul_(1.01)
    model = adapted(base)
    with pytest.warns(ActWarning) as caught:
        initialize_from_donor(model, donor)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "rope_theta is 1000.0 in the donor and 10000.0 in the base" in message
    assert "max_position_embeddings is 128 in the donor and 64 in the base" in message


def test_relatives_give_no_warning_and_strangers_do():
    base, donor = build_relatives("llama")
    model = adapted(base)
    initialize_from_donor(model, donor)  # a warning would be an error
    with pytest.warns(ActWarning, match="cosine of .*, as if the models had no common ancestor"):
        initialize_from_donor(model, build("llama", seed=7))


@pytest.mark.parametrize("trainable", ["deltas", "scales", "both"])
def test_low_cpu_mem_usage_does_not_lose_the_donor(tmp_path, trainable):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    config = ActConfig(
        channels=random_mask(base, 0.3), donor=str(tmp_path), trainable=trainable, task_type="CAUSAL_LM"
    )
    expected = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))(batch()).logits
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    assert torch.equal(model(batch()).logits, expected)


@pytest.mark.parametrize("trainable", ["deltas", "scales"])
def test_parameters_without_data_get_theirs_from_the_donor(trainable):
    base, donor = build_relatives("llama")
    models = []
    for low_cpu_mem_usage in (False, True):
        config = ActConfig(channels=random_mask(base, 0.3), trainable=trainable, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=low_cpu_mem_usage)
        initialize_from_donor(model, donor, transfer_scale=0.7)
        models.append(model)
    assert torch.equal(models[1](batch()).logits, models[0](batch()).logits)
    trains = [{n for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trains[0] == trains[1]
