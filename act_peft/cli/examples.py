"""Examples as TRL tokenises, masks and batches them for training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any


def batches_of(
    examples: Any,
    model: Any,
    *,
    tokenizer: str,
    batch_size: int,
    max_length: int,
    assistant_only: bool,
    device: str,
) -> Iterable[Any]:
    """The batches of a dataset.

    Args:
        examples: a dataset in one of TRL's formats.
        model: the model that they are for.
        tokenizer: folder or Hub id of its tokenizer.
        batch_size: examples in a batch.
        max_length: tokens of an example; what is longer is cut off.
        assistant_only: whether only the assistant's tokens count.
        device: where the model is.
    """
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as unused:  # TRL makes its folder, although nothing is saved there
        settings = SFTConfig(
            output_dir=unused,
            per_device_train_batch_size=batch_size,
            max_length=max_length,
            assistant_only_loss=assistant_only,
            use_cpu=device == "cpu",
            bf16=False,
            dataloader_pin_memory=False,
            report_to="none",
        )
        tokenizing = SFTTrainer(
            model,
            args=settings,
            train_dataset=examples,
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
        )
        return tokenizing.get_train_dataloader()
