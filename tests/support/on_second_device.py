"""Offloaded deltas on a second device. `layers/test_streaming.py` runs this file in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from act_peft import ActConfig, initialize_from_donor, prune_channels
from act_peft.layers import ActLayer
from tests.support.second_device import OTHER
from tests.support.tiny_models import batch, build_relatives, random_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word|Input and output embeddings are no longer"),
]


def learning(family, *, offload, dtype=torch.float32, before=None):
    base, donor = build_relatives(family, dtype=dtype)
    if before is not None:
        base.to(before)
    config = ActConfig(
        channels=random_mask(base, 0.3), trainable="scales", offload_deltas=offload, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    initialize_from_donor(model, donor)
    return model


def devices(model):
    """Part of the adapter -> where it is, without norms, whose deltas are as small as their scales."""
    found = {}
    for layer in (m for m in model.modules() if isinstance(m, ActLayer) and not m.kind.is_norm):
        for name in ("act_delta_weight", "act_delta_bias", "act_delta_channel_scale", "act_delta_index"):
            container = getattr(layer, name)
            if "default" in container:
                found.setdefault(name, set()).add(container["default"].device.type)
    return found


def logits(model):
    ids = batch()
    where = next(p.device for n, p in model.named_parameters() if "act_delta" not in n)
    mask = torch.ones_like(ids)
    return model(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False).logits


def train(model):
    """Two steps; the scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        logits(model).float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}


def test_the_device_tells_tensors_apart():
    with pytest.raises(RuntimeError, match="on the CPU among those on other"):
        torch.ones(2).to(OTHER) + torch.ones(2)


def test_offloaded_deltas_stay_on_the_cpu_and_train_the_same_scales(family, dtype):
    plain, offloaded = (learning(family, offload=offload, dtype=dtype) for offload in (False, True))
    start = {n: p.detach().clone() for n, p in plain.named_parameters() if p.requires_grad}
    on_cpu = train(copy.deepcopy(plain))
    for model in (plain, offloaded):
        model.to(OTHER)
    assert set.union(*devices(plain).values()) == {OTHER}
    found = devices(offloaded)
    assert found.pop("act_delta_weight") == {"cpu"}
    assert set.union(*found.values()) == {OTHER}
    kept, streamed = train(plain), train(offloaded)
    assert kept.keys() == streamed.keys() == on_cpu.keys()
    for name, scales in kept.items():
        assert torch.equal(streamed[name], scales), name
        assert not torch.equal(start[name], scales), name
        if dtype == torch.float32:
            torch.testing.assert_close(scales, on_cpu[name], rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for n, p in offloaded.named_parameters() if "act_delta_weight" in n)


def test_an_adapter_made_on_the_device_is_offloaded_at_once():
    model = learning("qwen2", offload=True, before=OTHER)
    found = devices(model)
    assert found.pop("act_delta_weight") == {"cpu"}
    assert set.union(*found.values()) == {OTHER}
    reference = learning("qwen2", offload=True).to(OTHER)
    assert torch.equal(logits(model).cpu(), logits(reference).cpu())


@pytest.mark.parametrize("trainable", ["deltas", "scales"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_donor_on_disk_fills_an_adapter_on_the_device(trainable, low_cpu_mem_usage, tmp_path):
    base, donor = build_relatives("qwen2")
    donor.save_pretrained(tmp_path)
    config = ActConfig(
        channels=random_mask(base, 0.3), donor=str(tmp_path), trainable=trainable, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base.to(OTHER), config, low_cpu_mem_usage=low_cpu_mem_usage)
    assert set.union(*devices(model).values()) == {OTHER}
    frozen = {n for n, p in model.named_parameters() if "act_delta_weight" in n and not p.requires_grad}
    assert bool(frozen) is (trainable == "scales")
    reference, _ = build_relatives("qwen2")
    reference = get_peft_model(reference, copy.deepcopy(config)).to(OTHER)
    assert torch.equal(logits(model).cpu(), logits(reference).cpu())


def test_dtypes_change_where_the_deltas_are():
    model = learning("llama", offload=True).to(OTHER).to(torch.bfloat16)
    weights = [p for n, p in model.named_parameters() if "act_delta_weight" in n and p.dim() == 2]
    assert {(p.device.type, p.dtype) for p in weights} == {("cpu", torch.bfloat16)}


def test_pruning_merging_and_unmerging_on_the_device(family):
    model = learning(family, offload=True).to(OTHER)
    before = logits(model).cpu()
    model.merge_adapter()
    torch.testing.assert_close(logits(model).cpu(), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model).cpu(), before)
    prune_channels(model)
    assert set.union(*devices(model).values()) == {OTHER}  # rows train beside the model
    torch.testing.assert_close(logits(model).cpu(), before, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for n, p in model.named_parameters() if "act_delta_weight" in n)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_is_loaded_to_where_it_was(low_cpu_mem_usage, tmp_path):
    model = learning("llama", offload=True)
    model.save_pretrained(tmp_path)
    base, _ = build_relatives("llama")
    loaded = PeftModel.from_pretrained(
        base.to(OTHER), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu"
    )
    found = devices(loaded)
    assert found.pop("act_delta_weight") == {"cpu"}
    assert set.union(*found.values()) == {OTHER}
    assert torch.equal(logits(loaded).cpu(), logits(model.to(OTHER)).cpu())


def test_a_mixed_batch_streams_too():
    model = learning("llama", offload=True).to(OTHER).eval()
    ids = batch().to(OTHER)
    mixed = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=False,
        adapter_names=["default", *["__base__"] * (len(ids) - 1)],
    ).logits.cpu()
    torch.testing.assert_close(mixed[:1], logits(model).cpu()[:1], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1:], logits(model).cpu()[1:], rtol=1e-4, atol=1e-4)
