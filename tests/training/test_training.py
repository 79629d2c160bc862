"""Fine-tuning through TRL's SFTTrainer: exactly the selected channels change, every other byte of the base stays."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from trl import SFTTrainer

from act_peft import ActConfig, localize
from act_peft.channels.kinds import channel_kind
from tests.support.tiny_data import FORMATS, build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import batch, build, build_relatives, random_mask, state_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]


def train(model, dataset, folder, *, peft_config=None, resume=None, **changes):
    trainer = SFTTrainer(
        model,
        args=training_settings(folder, **changes),
        train_dataset=dataset,
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def config(model, **changes):
    return ActConfig(channels=random_mask(model, 0.3), task_type="CAUSAL_LM", **changes)


def assert_only_selected_changed(tuned, before, mask):
    """The frozen base is byte-identical; of the merged one, every selected channel and no other has changed."""
    assert state_bytes(tuned.get_base_model()) == state_bytes(before)
    merged = copy.deepcopy(tuned).merge_and_unload()
    for name, index in mask.items():
        new, old = merged.get_submodule(name), before.get_submodule(name)
        dim = channel_kind(old).channel_dim
        changed = (
            (new.weight != old.weight).movedim(dim, 0).flatten(1).any(1)
            if new.weight.dim() > 1
            else (new.weight != old.weight)
        )
        assert torch.equal(changed.nonzero().flatten(), index), name
        if getattr(new, "bias", None) is not None:
            outside = torch.ones(len(new.bias), dtype=torch.bool)
            outside[index] = False
            assert torch.equal(new.bias[outside], old.bias[outside]), name


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_dataset_format_trains_exactly_the_selected_channels(format_name, tmp_path):
    make, changes = FORMATS[format_name]
    base = build("llama")
    before = copy.deepcopy(base)
    model = get_peft_model(base, config(base))
    train(model, make(), tmp_path, **changes)
    assert_only_selected_changed(model, before, random_mask(before, 0.3))


def test_every_family_trains_exactly_the_selected_channels(family, tmp_path):
    base = build(family, tie_word_embeddings=False)
    before = copy.deepcopy(base)
    model = get_peft_model(base, config(base))
    train(model, prompt_completion(), tmp_path)
    # Position embeddings beyond the longest sample get no gradient, but every selected column does.
    assert_only_selected_changed(model, before, random_mask(before, 0.3))


def test_the_trainer_builds_the_same_model_from_a_configuration(tmp_path):
    base = build("qwen2")
    ready = get_peft_model(copy.deepcopy(base), config(base))
    train(ready, prompt_completion(), tmp_path / "a")
    trainer = train(copy.deepcopy(base), prompt_completion(), tmp_path / "b", peft_config=config(base))
    for name, tensor in ready.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["checkpointing", "reentrant checkpointing", "accumulation"],
)
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_checkpointing_and_accumulation_give_the_same_result(tmp_path, changes):
    base = build("llama")
    plain, other = (get_peft_model(copy.deepcopy(base), config(base)) for _ in range(2))
    train(plain, prompt_completion(), tmp_path / "a")
    train(other, prompt_completion(), tmp_path / "b", **changes)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(
            other.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bf16_autocast_trains_float32_deltas(tmp_path):
    base = build("llama", dtype=torch.bfloat16)
    before = copy.deepcopy(base)
    model = get_peft_model(base, config(base))
    train(model, prompt_completion(), tmp_path, bf16=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert state_bytes(model.get_base_model()) == state_bytes(before)
    assert all(p.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*flash.*")
def test_packing_trains(tmp_path):
    base = build("llama")
    before = copy.deepcopy(base)
    model = get_peft_model(base, config(base))
    train(model, prompt_completion(), tmp_path, packing=True, packing_strategy="wrapped")
    assert_only_selected_changed(model, before, random_mask(before, 0.3))


def test_resuming_from_a_checkpoint_gives_the_uninterrupted_result(tmp_path):
    base = build("llama")
    whole, half, resumed = (get_peft_model(copy.deepcopy(base), config(base)) for _ in range(3))
    schedule = {"max_steps": 4, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    train(whole, prompt_completion(), tmp_path / "whole", **schedule)
    train(half, prompt_completion(), tmp_path / "half", **{**schedule, "max_steps": 2})
    train(resumed, prompt_completion(), tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint-2"), **schedule)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_an_adapted_output_layer_trains_as_its_dense_counterpart(tmp_path):
    """TRL reads `lm_head.weight`; the loss and the gradients must be those of the adapted weight."""
    base = build("llama")
    model = get_peft_model(base, ActConfig(channels={"lm_head": [3, 5, 8]}, init_weights=False, task_type="CAUSAL_LM"))
    ids = batch()
    trainer = SFTTrainer(
        model, args=training_settings(tmp_path), train_dataset=prompt_completion(), processing_class=build_tokenizer()
    )
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    fused.backward()
    head = model.get_base_model().lm_head
    fused_gradient = head.act_delta_weight["default"].grad.clone()
    head.act_delta_weight["default"].grad = None
    plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused_gradient, head.act_delta_weight["default"].grad)
    assert fused_gradient.abs().max() > 0
    with model.disable_adapter():
        assert torch.equal(head.weight, head.base_layer.weight)
    trainer.train()


def test_the_whole_way_from_two_models_to_a_merged_one(tmp_path):
    base, donor = build_relatives("llama")
    original = copy.deepcopy(base)
    donor.save_pretrained(tmp_path / "donor")
    tokenizing = SFTTrainer(
        base, args=training_settings(tmp_path), train_dataset=prompt_completion(), processing_class=build_tokenizer()
    )
    scores = localize(base, donor, tokenizing.get_train_dataloader())
    mask = scores.top(0.05)
    assert mask.num_selected == round(0.05 * sum(mask.num_channels.values()))
    model = get_peft_model(
        base, ActConfig(channels=mask, donor=str(tmp_path / "donor"), transfer_scale=0.4, task_type="CAUSAL_LM")
    )
    train(model, prompt_completion(), tmp_path)
    model.save_pretrained(tmp_path / "ability")
    expected = model.eval()(batch()).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "ability")
    assert torch.equal(loaded(batch()).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(batch()).logits, expected, rtol=1e-4, atol=1e-4)
