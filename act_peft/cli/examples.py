"""Models, and batches of examples: tokenized and masked by TRL, as for training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act_peft.data.tokenizing import TokenizedRows

DEVICE = "cuda if there is one"
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


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
    counted = parser.add_mutually_exclusive_group()
    counted.add_argument(
        "--assistant-only",
        action="store_true",
        help="end if the chat template does not mark the assistant's tokens (without it: then the last answer counts)",
    )
    counted.add_argument(
        "--all-tokens", action="store_true", help="count every token (without it: those of the answers)"
    )
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
    from act_peft.data.models import open_device

    return open_device(None if arguments.device == DEVICE else arguments.device)


def join_processes() -> None:
    """Join the other processes of a command that `torchrun` or `accelerate launch` has started several times."""
    import torch
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available())


class ExampleReader:
    """Reads datasets for one model, by the options of a command, and says what is counted and what is left out.

    Args:
        arguments: arguments of the command; `device` comes from `device_of`.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._tokenizer: Any = None

    def load(self, dataset: str) -> Any:
        """The examples of a dataset, in one of TRL's formats.

        Raises:
            ActValueError: there is no such dataset or split; it is damaged or empty; it has none of TRL's formats.
        """
        from act_peft.data.loading import load_examples

        options = self._arguments
        return load_examples(dataset, split=options.split, samples=options.samples, seed=options.seed)

    def load_by_column(self, dataset: str, column: str) -> dict[str, Any]:
        """The examples of a dataset by the values of a column.

        Raises:
            ActValueError: as `load`; there is no such column, or its values are no names.
        """
        from act_peft.data.loading import load_by_column

        options = self._arguments
        return load_by_column(dataset, column, split=options.split, samples=options.samples, seed=options.seed)

    def model(self, name: str) -> Any:
        """A model, with `--dtype` and `--device`.

        Raises:
            ActValueError: there is no model of this name.
        """
        from act_peft.data.models import load_model

        return load_model(name, dtype=self._arguments.dtype, device=self._arguments.device)

    def donor(self, name: str) -> Any:
        """A donor: a model, or the name of an adapter of the base."""
        from act_peft.transfer.donors import is_adapter

        return name if is_adapter(name) else self.model(name)

    def batches(self, examples: Any, model: Any, *, name: str) -> Iterable[Any]:
        """The batches of some examples, see `rows`."""
        return self.rows(examples, model, name=name).batches(self._arguments.batch_size)

    def own_batches(self, examples: Any, model: Any, *, name: str) -> list[Any]:
        """Those of the batches that this process works on, of several processes that share the work."""
        from act_peft.processes import num_processes, process_index

        return list(self.batches(examples, model, name=name))[process_index() :: num_processes()]

    def measured(self, examples: Any, model: Any, *, name: str) -> Iterable[Any]:
        """The batches of some examples to measure on: the end-of-text token that TRL adds does not count."""
        rows = self.rows(examples, model, name=name)
        return rows.without_end(self._tokenizer.eos_token_id).batches(self._arguments.batch_size)

    def rows(self, examples: Any, model: Any, *, name: str) -> TokenizedRows:
        """Some examples, tokenized as the base reads them.

        Args:
            examples: from `load`.
            model: the base.
            name: the dataset, for what is said of it.

        Raises:
            ActValueError: the base has no tokenizer, or there is no answer in the examples.
        """
        from act_peft.data.models import load_tokenizer
        from act_peft.data.tokenizing import tokenize
        from act_peft.processes import process_index

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._arguments.base)
        counted = "all" if self._arguments.all_tokens else "assistant" if self._arguments.assistant_only else "answers"
        rows = tokenize(
            examples,
            model,
            self._tokenizer,
            max_length=self._arguments.max_length,
            counted=counted,
            name=name,
        )
        for note in () if process_index() else rows.notes:
            print(f"act-peft: {note}", file=sys.stderr)
        return rows


def check_modules(model: Any, **options: Any) -> None:
    """Check that what `--target-modules` and `--exclude-modules` name is there.

    Raises:
        ActValueError: a name, or an expression, that matches no module with channels.
    """
    from act_peft.errors import ActValueError
    from act_peft.localization.candidates import unmatched_names

    for option, patterns in options.items():
        unmatched = unmatched_names(model, patterns)
        if unmatched:
            raise ActValueError(
                f"--{option.replace('_', '-')}: {', '.join(map(repr, unmatched))}: no module with channels has such a "
                "name, expected names of modules or of their ends"
            )


def _integer_from(smallest: int) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least `smallest`."""

    def integer(text: str) -> int:
        number = int(text)
        if number < smallest:
            raise argparse.ArgumentTypeError(f"got {number}, expected an integer from {smallest} on")
        return number

    return integer
