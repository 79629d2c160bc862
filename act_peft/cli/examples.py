"""Models, and batches of examples: tokenized and masked by TRL, as for training."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from act_peft.cli.imports import importing
from act_peft.errors import ActValueError

DEVICE = "cuda if there is one"
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
_BAD_EXAMPLES = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)  # raised by TRL


def add_examples(parser: argparse.ArgumentParser, *, samples: int, batch_size: int) -> None:
    """Add the options for reading examples and loading models.

    Args:
        parser: parser of the command.
        samples: default of `--samples`.
        batch_size: default of `--batch-size`.
    """
    parser.add_argument("--split", default="train", help="split of the datasets (train)")
    parser.add_argument(
        "--samples",
        type=_integer_from(1),
        default=samples,
        help=f"examples of each dataset, drawn at random ({samples})",
    )
    parser.add_argument("--assistant-only", action="store_true", help="count the assistant's tokens only")
    parser.add_argument(
        "--batch-size", type=_integer_from(1), default=batch_size, help=f"examples at a time ({batch_size})"
    )
    parser.add_argument(
        "--max-length",
        type=_integer_from(1),
        default=1024,
        help="tokens of an example; longer ones are cut off (1024)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the models (auto: that of their checkpoints)"
    )
    parser.add_argument("--device", default=DEVICE, help=f"device of the models ({DEVICE})")
    parser.add_argument("--seed", type=_integer_from(0), default=0, help="seed of the random draw of examples (0)")


def device_of(arguments: argparse.Namespace) -> str:
    """The device for `--device`.

    Raises:
        ActValueError: there is no such device here.
    """
    import torch

    if arguments.device == DEVICE:
        own = os.environ.get("LOCAL_RANK")  # torchrun and accelerate: a device for each process
        return f"cuda:{own}" if own and torch.cuda.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=arguments.device).item()
    except (AssertionError, RuntimeError) as error:  # an assertion: torch was built without support for the device
        raise ActValueError(
            f"device: got {arguments.device!r}, expected one that torch can use here ({str(error)[:120]}; "
            "try --device cpu)"
        ) from error
    return str(arguments.device)


def load_model(name: str, arguments: argparse.Namespace) -> Any:
    """Load a model, with `--dtype` and `--device`.

    Args:
        name: folder or Hub id.
        arguments: arguments of the command; `device` comes from `device_of`.

    Raises:
        ActValueError: there is no model of this name.
    """
    with importing():
        from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype)
    except ValueError as error:
        raise ActValueError(
            f"{name}: cannot be loaded, expected the folder or Hub id of a causal language model ({str(error)[:300]})"
        ) from error
    return model.to(arguments.device)


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
        model: the model that will read them.
        tokenizer: folder or Hub id of its tokenizer.
        batch_size: examples in a batch.
        max_length: tokens of an example; the rest is cut off.
        assistant_only: count only the assistant's tokens.
        device: device of the model.

    Raises:
        ActValueError: the model has no tokenizer, or the examples have none of TRL's formats.
    """
    with importing():
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

    try:
        processing = AutoTokenizer.from_pretrained(tokenizer)
    except ValueError as error:
        raise ActValueError(
            f"{tokenizer}: its tokenizer cannot be loaded, expected one in the folder of the model "
            f"({str(error)[:300]}; save it there)"
        ) from error
    with tempfile.TemporaryDirectory() as unused:  # TRL creates the folder, although nothing is saved there
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
        try:
            tokenizing = SFTTrainer(model, args=settings, train_dataset=examples, processing_class=processing)
        except _BAD_EXAMPLES as error:
            raise ActValueError(
                f"dataset with the columns {examples.column_names}: TRL cannot tokenize it, expected examples in one "
                f"of its formats ({type(error).__name__}: {str(error)[:300]})"
            ) from error
        return tokenizing.get_train_dataloader()


def _integer_from(smallest: int) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least `smallest`."""

    def integer(text: str) -> int:
        number = int(text)
        if number < smallest:
            raise argparse.ArgumentTypeError(f"got {number}, expected an integer from {smallest} on")
        return number

    return integer
