from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from act_peft.localization import localize

VOCAB = 40
SHAPE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS))


def _qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **HEADS))


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64))


def _gemma3():
    """Tied embeddings, norms that multiply by 1 + weight, query and key norms over heads."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **HEADS, head_dim=4, layer_types=["full_attention"] * 2))


# The paper's candidates: with the output layer and the embeddings.
localize_every = partial(localize, target_modules=".*")

BUILDERS = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2, "gemma3": _gemma3}


@pytest.fixture
def pair():
    """A function that builds a base and a donor: pair("llama")."""

    def build(family="llama"):
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = BUILDERS[family]().eval()
            with torch.no_grad():
                for parameter in model.parameters():  # also norms and biases, which start out equal
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            models.append(model)
        return models

    return build


@pytest.fixture
def samples():
    """Token ids and labels of samples of different lengths; the first tokens of each are a prompt."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for length in (9, 4, 7, 5, 11, 6):
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = -100
        made.append((ids, labels))
    return made


@pytest.fixture
def collate():
    """A function that pads samples into one batch, on the left or the right."""

    def pad(samples, side="right"):
        width = max(len(ids) for ids, _ in samples)
        batch = {
            "input_ids": torch.zeros(len(samples), width, dtype=torch.int64),
            "attention_mask": torch.zeros(len(samples), width, dtype=torch.int64),
            "labels": torch.full((len(samples), width), -100),
        }
        for row, (ids, labels) in enumerate(samples):
            at = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
            batch["input_ids"][row, at], batch["labels"][row, at] = ids, labels
            batch["attention_mask"][row, at] = 1
        return batch

    return pad


@pytest.fixture
def batches(samples, collate):
    return [collate(samples[i : i + 2]) for i in range(0, len(samples), 2)]


class Toy(nn.Module):
    """An embedding and a linear layer, and whatever a test hangs in between with `middle(self, hidden)`."""

    def __init__(self, **modules):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        for name, module in modules.items():
            self.add_module(name, module)
        self.head = nn.Linear(6, 5)
        self.middle = lambda _, hidden: hidden

    def forward(self, input_ids, **_):
        return self.head(self.middle(self, self.embed(input_ids)))


@pytest.fixture
def toy():
    """A function that builds a pair of toys: toy(middle, name=lambda: nn.Linear(6, 6))."""

    def build(middle=None, **modules):
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = Toy(**{name: make() for name, make in modules.items()})
            model.middle = middle or model.middle
            models.append(model)
        return models

    return build
