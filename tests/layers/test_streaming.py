"""Frozen differences that stay in CPU memory: the same numbers, nothing kept between forward and backward."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from trl import SFTTrainer

from act_peft import ActConfig, ActValueError, ScaleSparsityCallback, initialize_from_donor, prune_channels
from act_peft.layers import ActLayer
from act_peft.layers.streaming import streamed_linear
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import batch, build, build_relatives, random_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word|Input and output embeddings are no longer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]
ROOT = Path(__file__).parents[2]


def learning(family="llama", *, offload, dtype=torch.float32, **settings):
    base, donor = build_relatives(family, dtype=dtype)
    config = ActConfig(
        channels=random_mask(base, 0.3),
        trainable="scales",
        offload_deltas=offload,
        task_type="CAUSAL_LM",
        **settings,
    )
    model = get_peft_model(base, config)
    if config.donor is None:
        initialize_from_donor(model, donor)
    return model


def gradients(model, *, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=batch(), labels=batch()).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------- the numbers ---


@pytest.mark.parametrize("bias", [False, True])
def test_the_streamed_product_is_the_linear_layer_s(bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,))
    )
    offset = offset if bias else None
    x.requires_grad_()
    assert torch.equal(streamed_linear(x, weight, offset), torch.nn.functional.linear(x, weight, offset))
    assert torch.autograd.gradcheck(lambda x: streamed_linear(x, weight, offset), x)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_without_offloading(family, dtype, autocast):
    expected = gradients(learning(family, offload=False, dtype=dtype), autocast=autocast)
    found = gradients(learning(family, offload=True, dtype=dtype), autocast=autocast)
    assert found.keys() == expected.keys()
    assert all("channel_scale" in name for name in found)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_between_forward_and_backward_nothing_but_the_stored_differences_is_kept():
    model = learning("llama", offload=True, dtype=torch.bfloat16)
    stored = {p.data_ptr(): p for n, p in model.named_parameters() if "act_delta_weight" in n and p.dim() == 2}
    kept = []
    with (
        torch.autocast("cpu", torch.float16),  # another dtype than theirs, so that a copy would be seen
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        model(input_ids=batch())
    shapes = {shape for p in stored.values() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    of_their_shape = [t for t in kept if tuple(t.shape) in shapes and t.data_ptr() not in stored]
    streamed = {t.data_ptr() for t in kept} & stored.keys()
    assert len(streamed) == len(stored) - 1  # the embedding's looks up rows and keeps nothing
    assert not [t for t in of_their_shape if t.dtype == torch.float16]


def test_training_gives_the_same_adapter(tmp_path):
    files = []
    for offload in (False, True):
        model = learning(offload=offload)
        trainer = SFTTrainer(
            model,
            args=training_settings(tmp_path / f"run{offload}"),
            train_dataset=prompt_completion(8),
            processing_class=build_tokenizer(),
            callbacks=[ScaleSparsityCallback(0.5)],
        )
        trainer.train()
        model.save_pretrained(tmp_path / f"{offload}")
        files.append((tmp_path / f"{offload}" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_donor_on_disk_fills_them(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    config = ActConfig(channels=random_mask(base, 0.3), donor=str(tmp_path), trainable="scales", offload_deltas=True)
    model = get_peft_model(base, config)
    assert torch.equal(model(batch()).logits, learning(offload=False)(batch()).logits)


# ------------------------------------------------------------------------------------------------- another device ---


def test_on_a_second_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/support/on_second_device.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "skipped" not in run.stdout


# -------------------------------------------------------------------------------------------------- what it means ---


def test_data_parallel_training_is_told_to_leave_them_alone():
    model = learning("qwen2", offload=True)
    names = set(model._ddp_params_and_buffers_to_ignore)
    offloaded = {n for n, p in model.named_parameters() if "act_delta_weight" in n and p.dim() == 2}
    assert names & {n for n, _ in model.named_parameters()} == offloaded
    assert names & {n for n, _ in model.base_model.named_parameters()} == {
        n.removeprefix("base_model.") for n in offloaded
    }
    assert not learning("qwen2", offload=False)._ddp_params_and_buffers_to_ignore


def test_the_setting_is_saved_and_ends_with_the_scales(tmp_path):
    model = learning(offload=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["offload_deltas"] is True
    base, _ = build_relatives("llama")
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    assert loaded._ddp_params_and_buffers_to_ignore
    prune_channels(loaded)
    assert loaded.peft_config["default"].offload_deltas is False
    assert not loaded._ddp_params_and_buffers_to_ignore


def test_deleting_the_adapter_forgets_it():
    model = learning(offload=True)
    model.add_adapter("other", ActConfig(channels=random_mask(build("llama"), 0.3), task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert not model._ddp_params_and_buffers_to_ignore


def test_a_norm_s_difference_moves_with_the_model():
    model = learning(offload=True)
    for layer in (m for m in model.modules() if isinstance(m, ActLayer)):
        assert bool(layer.offloaded_parameters()) is not layer.kind.is_norm


@pytest.mark.parametrize("trainable", ["deltas", "both"])
def test_rows_that_train_cannot_be_offloaded(trainable):
    with pytest.raises(
        ActValueError, match=f"offload_deltas: got True with trainable='{trainable}', expected 'scales'"
    ):
        ActConfig(trainable=trainable, offload_deltas=True)


def test_a_copy_of_the_model_streams_its_own():
    model = learning(offload=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "act_delta_weight" in name:
                parameter.zero_()
    assert torch.equal(twin(batch()).logits, learning(offload=True)(batch()).logits)
    assert torch.equal(model(batch()).logits, build("llama")(batch()).logits)
