"""Preference and online training through TRL: the reference is the base, and only the selected channels change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from act_peft import ActConfig
from tests.support.tiny_data import WORDS, build_tokenizer
from tests.support.tiny_models import build, build_relatives, random_mask, state_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]
ROWS = 8
BETA = 0.1
ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}

# TRL adds up float32 log-probabilities of padded batches, the oracle float64 ones of single samples.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def common(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": ROWS,  # a batch is the whole dataset
        "learning_rate": 1e-2,
        "beta": BETA,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    return {**defaults, **changes}


def preferences():
    """Chosen and rejected answers of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": f"{WORDS[i]} plus {WORDS[i + 1]} is ",
                "chosen": " ".join(WORDS[i : i + 1 + i % 3]),
                "rejected": " ".join(WORDS[i + 4 : i + 6 + i % 2]),
            }
            for i in range(ROWS)
        ]
    )


def dpo(model, folder, *, ref_model=None, peft_config=None, **changes):
    return DPOTrainer(
        model,
        ref_model=ref_model,
        args=DPOConfig(**common(folder, max_length=48, **changes)),
        train_dataset=preferences(),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


def config(model, **changes):
    return ActConfig(channels=random_mask(model, 0.3), task_type="CAUSAL_LM", **changes)


def prefers_w_words(completions, **_):
    """A reward that differs between completions: how many of their words are among the meaningless ones."""
    return [float(sum(word.startswith("w") for word in text.split())) for text in completions]


def online(name, model, folder, *, reward=prefers_w_words, peft_config=None, **changes):
    trainer_class, config_class = ONLINE[name]
    settings = {"num_generations": 4, "max_completion_length": 6, "temperature": 1.0, "num_iterations": 2}
    return trainer_class(
        model,
        reward_funcs=reward,
        args=config_class(**common(folder, **{**settings, **changes})),
        train_dataset=Dataset.from_list([{"prompt": f"{WORDS[i]} plus"} for i in range(ROWS)]),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


@torch.no_grad()
def log_probability(model, prompt, completion):
    """Sum of the log-probabilities of the completion's tokens, of one sample without padding, in float64."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()  # [T, V]
    predicted = F.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return sum(float(predicted[i, token]) for i, token in enumerate(completion))


def samples(batch):
    """The prompt and completion tokens of every row of a collated batch: first the chosen ones, then the rejected."""
    for ids, attended, counted in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        yield ids[attended & ~counted].tolist(), ids[attended & counted].tolist()


def log_probabilities(model, batch):
    """Of chosen and of rejected answers, float64 `[2, B]`."""
    values = [log_probability(model, *sample) for sample in samples(batch)]
    return torch.tensor(values, dtype=torch.float64).view(2, -1)


def dpo_loss(policy, reference):
    """Equation 7 of arXiv 2305.18290, for log-probabilities `[2, B]`."""
    chosen, rejected = policy - reference
    return float(-F.logsigmoid(BETA * (chosen - rejected)).mean())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_bytes(model, adapter="default"):
    return {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.endswith(f".{adapter}")
    }


def assert_only_deltas_changed(model, before, first):
    """All base bytes stay; what trains are deltas, and each of them has moved."""
    assert state_bytes(model.get_base_model()) == state_bytes(before)
    assert all(".act_delta_" in name for name, p in model.named_parameters() if p.requires_grad)
    last = adapter_bytes(model)
    for name, tensor in last.items():
        assert torch.equal(tensor, first[name]) == (".act_delta_index." in name), name


@pytest.mark.parametrize("ready", [False, True], ids=["configuration", "ready model"])
def test_dpo_starts_at_the_base_and_changes_deltas_alone(ready, tmp_path):
    base = build("llama")
    model = copy.deepcopy(base)
    if ready:
        trainer = dpo(get_peft_model(model, config(model)), tmp_path)
    else:
        trainer = dpo(model, tmp_path, peft_config=config(model))
    assert isinstance(trainer.model, PeftModel)
    assert trainer.ref_model is None
    first = adapter_bytes(trainer.model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(trainer)[1] < math.log(2)
    assert_only_deltas_changed(trainer.model, base, first)


def test_dpo_with_a_donor_is_measured_against_the_base_alone(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path / "donor")
    settings = config(base, donor=str(tmp_path / "donor"), transfer_scale=1.0)
    trainer = dpo(copy.deepcopy(base), tmp_path, peft_config=settings)
    batch = next(iter(trainer.get_train_dataloader()))
    policy = get_peft_model(copy.deepcopy(base), settings).merge_and_unload()
    expected = dpo_loss(log_probabilities(policy, batch), log_probabilities(base, batch))
    assert abs(expected - math.log(2)) > 1e-3
    first = adapter_bytes(trainer.model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-5)
    assert_only_deltas_changed(trainer.model, base, first)


def test_precomputed_reference_log_probabilities_are_those_of_the_base_alone(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path / "donor")
    settings = config(base, donor=str(tmp_path / "donor"), transfer_scale=1.0)
    trainer = dpo(copy.deepcopy(base), tmp_path, peft_config=settings, precompute_ref_log_probs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    stored = torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double().cpu()
    torch.testing.assert_close(stored, log_probabilities(base, batch), **TOLERANCE)
    assert not torch.allclose(stored, log_probabilities(donor, batch), atol=1e-2)


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved and loaded"])
def test_the_reference_of_a_trained_adapter_is_a_copy_of_it(saved, tmp_path):
    base = build("llama")
    model = get_peft_model(copy.deepcopy(base), config(base, init_weights=False))
    if saved:
        model.save_pretrained(tmp_path / "ability")
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ability", is_trainable=True)
    first = adapter_bytes(model)
    trainer = dpo(model, tmp_path)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert_only_deltas_changed(model, base, first)
    for name, tensor in adapter_bytes(model, "ref").items():
        assert torch.equal(tensor, first[name.removesuffix("ref") + "default"]), name


@pytest.mark.parametrize("ready", [False, True], ids=["configuration", "ready model"])
@pytest.mark.parametrize("name", ONLINE)
def test_online_training_starts_at_the_base_and_changes_deltas_alone(name, ready, tmp_path):
    base = build("llama")
    model = copy.deepcopy(base)
    if ready:
        trainer = online(name, get_peft_model(model, config(model)), tmp_path)
    else:
        trainer = online(name, model, tmp_path, peft_config=config(model))
    first = adapter_bytes(trainer.model)
    trainer.train()
    assert next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry) == 0
    assert_only_deltas_changed(trainer.model, base, first)


def test_online_training_with_a_donor_is_measured_against_the_base_alone(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path / "donor")
    drawn = []

    def reward(prompts, completions, completion_ids, **_):
        drawn.extend(zip(prompts, completion_ids, strict=True))
        return prefers_w_words(completions)

    settings = config(base, donor=str(tmp_path / "donor"), transfer_scale=1.0)
    policy = get_peft_model(copy.deepcopy(base), settings).merge_and_unload()
    trainer = online("rloo", copy.deepcopy(base), tmp_path, reward=reward, peft_config=settings, max_steps=1)
    trainer.train()
    tokenizer = build_tokenizer()
    divergence = [
        log_probability(policy, tokenizer(prompt)["input_ids"], ids)
        - log_probability(base, tokenizer(prompt)["input_ids"], ids)
        for prompt, ids in drawn
    ]
    assert len(divergence) == ROWS
    expected = sum(divergence) / sum(len(ids) for _, ids in drawn)  # TRL reports it per token
    assert abs(expected) > 1e-3
    measured = next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert measured == pytest.approx(expected, abs=1e-5)
