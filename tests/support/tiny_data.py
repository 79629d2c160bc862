"""Datasets and a tokenizer for training tests: a handful of words, in the formats that TRL's SFTTrainer takes."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from tests.support.tiny_models import VOCABULARY

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "plus",
    "minus",
    "is",
    "and",
    "red",
    "blue",
    "green",
    "user",
    "assistant",
    ":",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "assistant : {% generation %}{{ message['content'] }} {{ eos_token }}{% endgeneration %} "
    "{% else %}user : {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


def _pairs(rows: int) -> list[tuple[str, str]]:
    return [(f"{WORDS[i % 9]} plus {WORDS[(i * 3) % 9]} is", WORDS[(i * 5) % 10]) for i in range(rows)]


def prompt_completion(rows: int = 12) -> Dataset:
    return Dataset.from_list([{"prompt": f"{p} ", "completion": c} for p, c in _pairs(rows)])


def conversational(rows: int = 12) -> Dataset:
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in _pairs(rows)]
    )


def plain_text(rows: int = 12) -> Dataset:
    return Dataset.from_list([{"text": f"{p} {c}"} for p, c in _pairs(rows)])


FORMATS = {
    "prompt and completion": (prompt_completion, {}),
    "conversational, assistant only": (conversational, {"assistant_only_loss": True}),
    "plain text": (plain_text, {}),
}


def training_settings(folder, **changes: object) -> SFTConfig:
    """Three quiet steps on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 48,
        "seed": 0,
    }
    return SFTConfig(**{**defaults, **changes})
