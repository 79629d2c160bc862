"""On-policy distillation through TRL: the donor grades what the model writes, and rows on `lm_head` train too."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from act_peft import ActConfig, KeepCallback
from act_peft.localization.pair import open_pair
from tests.support.teaching import Gradients, keep_batch
from tests.support.tiny_data import build_tokenizer
from tests.support.tiny_models import build_relatives, state_bytes
from tests.support.versions import skip_as_older

trl = pytest.importorskip("trl")
if not hasattr(trl, "DistillationTrainer"):
    skip_as_older("trl", "has no stable DistillationTrainer")
DistillationConfig, DistillationTrainer = trl.DistillationConfig, trl.DistillationTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]
CHANNELS = {"lm_head": list(range(0, 48, 2)), "down_proj": [0, 1]}


def adapted(base, channels=CHANNELS):
    return get_peft_model(base, ActConfig(channels=channels, task_type="CAUSAL_LM"))


def distil(model, donor, folder, *callbacks, steps=2):
    arguments = DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        max_completion_length=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = DistillationTrainer(
        model=model,
        teacher_model=donor,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "one plus two is"}] * 8),
        processing_class=build_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def moved(model):
    found = model.named_parameters()
    return {n.split(".act_delta")[0].rpartition(".")[2] for n, p in found if "act_delta_weight" in n and p.any()}


def test_the_rows_of_every_module_train_those_of_the_output_layer_too(tmp_path):
    base, donor = build_relatives("llama")
    model, before, teacher = adapted(base), state_bytes(base), state_bytes(donor)
    distil(model, donor, tmp_path)
    assert moved(model) == {"lm_head", "down_proj"}
    assert {name: before[name] for name in state_bytes(base)} == state_bytes(base)
    assert state_bytes(donor) == teacher


def test_the_gradient_on_the_output_layer_is_that_of_training_its_weight(tmp_path):
    """The same seeds, the same completions: rows of a dense output layer have the gradients of the deltas."""
    base, donor = build_relatives("llama")
    dense, gradients, of_rows = copy.deepcopy(base).requires_grad_(False), Gradients(), Gradients()
    dense.lm_head.weight.requires_grad_(True)
    distil(dense, copy.deepcopy(donor), tmp_path / "dense", gradients, steps=1)
    distil(adapted(base, {"lm_head": CHANNELS["lm_head"]}), donor, tmp_path / "rows", of_rows, steps=1)
    (expected,) = gradients.seen[0].values()
    (found,) = (gradient for name, gradient in of_rows.seen[0].items() if "act_delta_weight" in name)
    torch.testing.assert_close(found, expected[CHANNELS["lm_head"]], rtol=1e-4, atol=1e-7)
    assert found.abs().max() > 0


@pytest.mark.parametrize("kind", ["LoRA", "ACT"])
def test_an_adapter_of_the_base_is_the_donor_in_the_memory_of_one_model(tmp_path, kind):
    base, _ = build_relatives("llama")
    lora = LoraConfig(target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    rows = ActConfig(channels=CHANNELS, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(base), lora if kind == "LoRA" else rows).save_pretrained(tmp_path / "donor")
    base, donor = open_pair(base, tmp_path / "donor", merged=False)
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    model, before = adapted(base), state_bytes(donor)
    distil(model, donor, tmp_path / "training")
    assert moved(model) == {"lm_head", "down_proj"}
    assert state_bytes(donor) == before
    assert pointers <= {parameter.data_ptr() for parameter in donor.parameters()}


def test_the_base_keeps_the_rest_meanwhile(tmp_path):
    base, donor = build_relatives("llama")
    trainer = distil(adapted(base), donor, tmp_path, KeepCallback([keep_batch()]), steps=3)
    found = [entry["keep_divergence"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[2] > 1e-6
