"""Examples as TRL tokenises, masks and batches them for training."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from typing import Any

DEVICE = "cuda if there is one"


def add_examples(parser: argparse.ArgumentParser, *, samples: int, batch_size: int) -> None:
    """Add how examples are drawn and read, and how models are loaded for them.

    Args:
        parser: of the command.
        samples: default of `--samples`.
        batch_size: default of `--batch-size`.
    """
    parser.add_argument("--split", default="train", help="split of the datasets (train)")
    parser.add_argument("--samples", type=int, default=samples, help=f"how many examples of each, drawn ({samples})")
    parser.add_argument("--assistant-only", action="store_true", help="count the assistant's tokens only")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"examples at a time ({batch_size})")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of an example (1024)")
    parser.add_argument("--dtype", default="auto", help="dtype of the models (that of their checkpoints)")
    parser.add_argument("--device", default=DEVICE, help="where the models run")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (0)")


def device_of(arguments: argparse.Namespace) -> str:
    """The device that `--device` means."""
    import torch

    if arguments.device != DEVICE:
        return str(arguments.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


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
