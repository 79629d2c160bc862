"""The promises of the library, on four families of models in float32 and bfloat16."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from act_peft import ActConfig, ActWarning, ChannelMask, initialize_from_donor
from act_peft.channels.kinds import channel_kind
from tests.support.tiny_models import batch, build, build_relatives, candidates, random_mask, state_bytes

pytestmark = [
    # Two of the families tie their embeddings and the masks cover every module.
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


def adapted(model, density=0.3, *, seed=0, **settings):
    mask = random_mask(model, density, seed=seed)
    return get_peft_model(model, ActConfig(channels=mask, task_type="CAUSAL_LM", **settings)).eval()


def test_without_donor_and_training_the_output_is_the_base_s_bit_for_bit(family, dtype):
    model = build(family, dtype=dtype)
    expected = model(batch()).logits
    assert torch.equal(adapted(model)(batch()).logits, expected)


def test_with_everything_selected_and_scale_one_the_merged_weights_are_the_donor_s(family, dtype):
    base, donor = build_relatives(family, dtype=dtype)
    theirs = donor.state_dict()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    mask = ChannelMask({n: range(c) for n, c in candidates(base).items()}, candidates(base))
    model = get_peft_model(base, ActConfig(channels=mask, task_type="CAUSAL_LM"))
    initialize_from_donor(model, donor, transfer_scale=1.0)
    merged = model.merge_and_unload().state_dict()
    one_rounding = torch.finfo(dtype).eps
    for name, tensor in merged.items():
        size = torch.maximum(theirs[name].abs(), before[name].abs()).float()
        assert ((tensor.float() - theirs[name].float()).abs() <= one_rounding * size).all(), name


def test_channels_that_are_not_selected_keep_their_bytes_when_merged(family, dtype):
    model = build(family, dtype=dtype)
    before = copy.deepcopy(model)
    mask = random_mask(model, 0.3)
    merged = get_peft_model(model, ActConfig(channels=mask, init_weights=False)).merge_and_unload()
    changed = 0
    for name, module in merged.named_modules():
        if name not in mask:
            continue
        dim = channel_kind(module).channel_dim
        original = before.get_submodule(name)
        rest = torch.tensor([i for i in range(mask.num_channels[name]) if i not in mask[name]], dtype=torch.int64)
        pairs = [(module.weight, original.weight, dim)]
        if getattr(module, "bias", None) is not None:
            pairs.append((module.bias, original.bias, 0))
        for new, old, axis in pairs:
            assert torch.equal(new.index_select(axis, rest), old.index_select(axis, rest)), name
            assert not torch.equal(new.index_select(axis, mask[name]), old.index_select(axis, mask[name])), name
            changed += 1
    assert changed >= len(mask)


def test_unmerge_gives_the_base_s_bytes_back(family, dtype):
    model = build(family, dtype=dtype)
    before = state_bytes(model)
    tuned = adapted(model, init_weights=False)
    tuned.add_adapter("other", ActConfig(channels=random_mask(build(family), 0.5, seed=1), init_weights=False))
    tuned.base_model.set_adapter(["default", "other"])
    tuned.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="additionally merging"):
        tuned.merge_adapter(["default"])
    assert state_bytes(tuned.get_base_model()) != before
    tuned.unmerge_adapter()
    assert state_bytes(tuned.get_base_model()) == before


def test_merged_and_unmerged_outputs_agree(family):
    model = build(family)
    tuned = adapted(model, init_weights=False)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "act_delta_" in name:
                parameter.mul_(0.05)
        expected = tuned(batch()).logits
        torch.testing.assert_close(tuned.merge_and_unload()(batch()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_are_bit_equal_and_the_file_holds_nothing_else(family, dtype, tmp_path, low_cpu_mem_usage):
    model = build(family, dtype=dtype)
    fresh = copy.deepcopy(model)
    mask = random_mask(model, 0.3)
    tuned = adapted(model, init_weights=False)
    tuned.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert kinds <= {"act_delta_weight", "act_delta_bias", "act_delta_index"}
    for name, index in mask.items():
        assert torch.equal(tensors[f"base_model.model.{name}.act_delta_index"], index)
        weight = tensors[f"base_model.model.{name}.act_delta_weight"]
        dim = channel_kind(fresh.get_submodule(name)).channel_dim
        assert weight.shape[dim] == index.numel()
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    for key, tensor in tuned.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert loaded.state_dict()[key].dtype == tensor.dtype, key
    assert torch.equal(loaded(batch()).logits, tuned(batch()).logits)


def test_the_configuration_file_is_readable_and_holds_no_index_lists(tmp_path):
    adapted(build("llama"), init_weights=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["channels"] is None
    assert saved["peft_type"] == "ACT"

    def lists(value):
        if isinstance(value, dict):
            for entry in value.values():
                yield from lists(entry)
        elif isinstance(value, list):
            yield value

    assert not [entry for entry in lists(saved) if any(isinstance(number, int) for number in entry)]
    assert saved["adapted_modules"]["lm_head"]["selected"] == round(0.3 * 48)


def test_loading_opens_neither_donor_nor_mask_and_runs_nothing(tmp_path, monkeypatch):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path / "donor")
    mask = random_mask(base, 0.3)
    mask.save(tmp_path / "mask.safetensors")
    fresh = copy.deepcopy(base)
    config = ActConfig(channels=tmp_path / "mask.safetensors", donor=str(tmp_path / "donor"), task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = tuned(batch()).logits
    # What is gone cannot be opened, and whoever tries to load a model or a pickle fails.
    for path in sorted((tmp_path / "donor").iterdir()):
        path.unlink()
    (tmp_path / "mask.safetensors").unlink()

    def forbidden(*args, **kwargs):
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr("act_peft.tuner.model.donor_for_model", forbidden)
    monkeypatch.setattr("torch.load", forbidden)
    monkeypatch.setattr("act_peft.layers.targets.ChannelMask.load", forbidden)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(loaded(batch()).logits, expected)


def test_a_hostile_configuration_makes_nothing_open(tmp_path, monkeypatch):
    base = build("llama")
    fresh = copy.deepcopy(base)
    adapted(base).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    hostile = {**json.loads(path.read_text()), "channels": str(tmp_path / "mask"), "donor": "somebody/model"}
    path.write_text(json.dumps(hostile))

    def forbidden(*args, **kwargs):
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr("act_peft.tuner.model.donor_for_model", forbidden)
    monkeypatch.setattr("act_peft.layers.targets.ChannelMask.load", forbidden)
    with pytest.raises(ValueError, match=r"channels: got '.*mask' in a configuration from a file"):
        PeftModel.from_pretrained(fresh, tmp_path)


def test_two_active_adapters_add_up_in_any_order(family, dtype):
    model = build(family, dtype=dtype)
    names = ("first", "second")
    masks = {name: random_mask(model, 0.3, seed=seed) for seed, name in enumerate(names)}
    tuned = get_peft_model(model, ActConfig(channels=masks["first"], init_weights=False), adapter_name="first")
    tuned.add_adapter("second", ActConfig(channels=masks["second"], init_weights=False))
    tuned.eval()
    layer = next(m for m in tuned.modules() if hasattr(m, "act_delta_weight") and m.kind.value in ("linear", "conv1d"))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(5)).to(dtype)
    outputs = {}
    for active in (["first"], ["second"], ["first", "second"], ["second", "first"]):
        tuned.base_model.set_adapter(active)
        with torch.no_grad():
            outputs[tuple(active)] = (layer(x).float(), tuned(batch()).logits)
    assert torch.equal(outputs["first", "second"][1], outputs["second", "first"][1])
    base = layer.base_layer(x).float()
    alone = outputs["first",][0] + outputs["second",][0] - base
    tolerance = 4 * torch.finfo(dtype).eps * alone.abs().max()  # three roundings of the output's dtype
    torch.testing.assert_close(outputs["first", "second"][0], alone, rtol=0, atol=float(tolerance))


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16])
def test_an_adapter_recognises_its_base_in_another_dtype(family, tmp_path, made_in, loaded_in):
    base = build(family, dtype=torch.bfloat16)
    adapted(copy.deepcopy(base).to(made_in)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base.to(loaded_in), tmp_path)  # a warning would be an error


def test_an_adapter_says_when_it_is_loaded_on_other_weights(family, dtype, tmp_path):
    base, relative = build_relatives(family, dtype=dtype)
    adapted(base).save_pretrained(tmp_path)
    with pytest.warns(ActWarning, match=r"made for a base with other weights: \d+ of \d+ modules differ"):
        PeftModel.from_pretrained(relative, tmp_path)
