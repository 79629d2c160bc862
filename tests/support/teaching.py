"""Trainings with a teacher beside them, and the divergence from its definition."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from act_peft import ActConfig, initialize_from_donor
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import batch, build_relatives, random_mask


def keep_batch(seed=5):
    """Four samples of which the last three tokens are answers."""
    ids = batch(rows=4, length=8, seed=seed)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def adapted(config=None, *, family="llama", base_settings=None, **settings):
    """A model whose adapter changes its answers already."""
    base, donor = build_relatives(family, **(base_settings or {}))
    if config is None:
        config = ActConfig(channels=random_mask(base, 0.3), transfer_scale=1.0, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config)
    if isinstance(config, ActConfig):
        initialize_from_donor(model, donor)
    return model


class Gradients(TrainerCallback):
    """Notes the gradients with which the optimizer steps."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        found = kwargs["model"].named_parameters()
        self.seen.append({n: p.grad.clone() for n, p in found if p.grad is not None})


def train(model, folder, *callbacks, steps=1, with_trl=True, **changes):
    settings = {
        "max_steps": steps,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **changes,
    }
    arguments = training_settings(folder, **settings)
    if with_trl:
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=prompt_completion(8),
            processing_class=build_tokenizer(),
            callbacks=list(callbacks),
        )
    else:
        samples = [{"input_ids": row, "labels": row.clone()} for row in batch(rows=8)]
        trainer = Trainer(model, arguments, train_dataset=samples, callbacks=list(callbacks))
    trainer.train()
    return trainer


def divergence(model, inputs):
    """KL(base || model) over the answers' tokens, from its definition, in float64."""
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=inputs["input_ids"]).logits.double().softmax(-1)
    mine = model(input_ids=inputs["input_ids"]).logits.double().softmax(-1)
    terms = (base * (base.log() - mine.log())).sum(-1)[:, :-1]
    return terms[inputs["labels"][:, 1:] != -100].mean()


class Passes(TrainerCallback):
    """Counts the samples that go through a backbone, a list of numbers for each step: one number for each pass."""

    def __init__(self, backbone: nn.Module):
        self.steps: list[list[int]] = []
        backbone.register_forward_hook(self.count)

    def count(self, module, args, output):
        if self.steps:
            self.steps[-1].append(len(output.last_hidden_state))

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append([])
