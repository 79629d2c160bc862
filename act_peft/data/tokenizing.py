"""Examples as rows of tokens with labels: tokenized by TRL's `SFTTrainer`, as for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from act_peft.batches.answer_tokens import IGNORED_LABEL
from act_peft.data.counting import Counted, CountedExamples, count_answers
from act_peft.data.failures import reason_of
from act_peft.errors import ActError, ActValueError
from act_peft.interrupts import scratch_folder

FEW_TOKENS = 100  # from so few answer tokens figures are rough
_MASKS = ("completion_mask", "assistant_masks")  # columns of older TRL in place of labels


@dataclass(frozen=True)
class TokenizedRows:
    """Rows of tokens, which TRL's trainers and this library take.

    Attributes:
        rows: the columns `input_ids` and `labels`; every row has a label that is counted.
        num_tokens: number of counted tokens.
        collator: makes a batch `[B, T]` of rows, padded on the right.
        notes: sentences on what is counted if it is not the answers, and on what was left out.
    """

    rows: Dataset
    num_tokens: int
    collator: Any
    notes: tuple[str, ...]

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterable[dict[str, torch.Tensor]]:
        """Batches of the rows, in their order, or shuffled anew each time with a seed."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return _Batches(self.rows, batch_size, self.collator, generator)

    def without_end(self, token: int | None) -> TokenizedRows:
        """The same rows to measure on: the end-of-text token that TRL adds to texts is not counted.

        Whether a model expects it after an answer says nothing about the answer.

        Args:
            token: id of the end-of-text token; None: the tokenizer has none.
        """

        def labels(row: dict[str, list[int]]) -> dict[str, list[int]]:
            found = row["labels"]
            is_added = found[-1] == token and any(label != IGNORED_LABEL for label in found[:-1])
            return {"labels": [*found[:-1], IGNORED_LABEL] if is_added else found}

        rows = self.rows.map(labels)
        num_tokens = sum(label != IGNORED_LABEL for row in rows["labels"] for label in row)
        return replace(self, rows=rows, num_tokens=num_tokens)


class _Batches:
    """Batches of tensors, with a length. What the collator adds for a trainer alone is left out."""

    def __init__(self, rows: Dataset, batch_size: int, collator: Any, generator: torch.Generator | None) -> None:
        self._loader: DataLoader = DataLoader(
            rows,
            batch_size=batch_size,
            shuffle=generator is not None,
            generator=generator,
            collate_fn=collator,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self._loader


def joined(parts: Sequence[TokenizedRows]) -> TokenizedRows:
    """The rows of several datasets of one tokenizer as one."""
    return TokenizedRows(
        rows=concatenate_datasets([part.rows for part in parts]),
        num_tokens=sum(part.num_tokens for part in parts),
        collator=parts[0].collator,
        notes=tuple(note for part in parts for note in part.notes),
    )


def tokenize(
    examples: Dataset,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    counted: str | Counted = Counted.ANSWERS,
    name: str = "dataset",
) -> TokenizedRows:
    """Tokenize examples, and mask what is not counted.

    Args:
        examples: a dataset in one of TRL's formats.
        model: the model that will read them.
        tokenizer: its tokenizer.
        max_length: tokens of an example; the rest is cut off.
        counted: `answers`, `assistant` or `all`, see `act_peft.data.counting`.
        name: name of the dataset, for messages.

    Raises:
        ActValueError: the examples have none of TRL's formats, or no answer, or none within `max_length`.

    Example:
        >>> tokenize(examples, model, tokenizer, max_length=512).num_tokens
        1098
    """
    try:
        prepared = count_answers(examples, tokenizer, counted)
        try:
            tokenized, collator = _tokenize(prepared, model)
        except RuntimeError:  # the template marks nothing in one of the examples
            if not prepared.assistant_only:
                raise
            prepared = count_answers(examples, tokenizer, counted, by_template=False)
            tokenized, collator = _tokenize(prepared, model)
        labelled = tokenized.map(_labelled, remove_columns=tokenized.column_names)
        _check_tokens(labelled, tokenizer, model)
    except ActError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:  # damaged examples and tokenizers fail anywhere inside TRL
        raise ActValueError(
            f"{name} with the columns {examples.column_names}: TRL cannot tokenize it, expected examples in one of "
            f"its formats ({reason_of(error)})"
        ) from error
    longer = sum(len(ids) > max_length for ids in labelled["input_ids"])
    cut = (
        labelled.map(lambda row: {column: values[:max_length] for column, values in row.items()})
        if longer
        else labelled
    )
    counts = [sum(label != IGNORED_LABEL for label in labels) for labels in cut["labels"]]
    kept = [number for number, count in enumerate(counts) if count]
    if not kept:
        raise ActValueError(
            f"{name}: got no answer within the first {max_length} tokens of any of {len(counts)} examples, "
            "expected at least one (allow more tokens, or write shorter prompts)"
        )
    notes = _notes(prepared, len(examples), longer, len(counts) - len(kept), sum(counts), max_length)
    rows = cut if len(kept) == len(counts) else cut.select(kept)
    return TokenizedRows(rows, sum(counts), collator, tuple(f"{name}: {note}" for note in notes))


def _tokenize(prepared: CountedExamples, model: nn.Module) -> tuple[Dataset, Any]:
    """What `SFTTrainer` makes of the examples, and its collator."""
    examples = prepared.examples
    with scratch_folder() as unused:  # TRL creates the folder, although nothing is saved there
        settings = SFTConfig(
            output_dir=str(unused),
            max_length=None,
            assistant_only_loss=prepared.assistant_only,
            completion_only_loss=prepared.completion_only if "completion" in examples.column_names else None,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            dataloader_pin_memory=False,
            report_to="none",
        )
        trainer = SFTTrainer(model, args=settings, train_dataset=examples, processing_class=prepared.tokenizer)
        return trainer.train_dataset, trainer.data_collator


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    ids = row["input_ids"]
    if "labels" in row:
        return {"input_ids": ids, "labels": row["labels"]}
    masks = [row[name] for name in _MASKS if name in row]
    labels = [token if all(bits) else IGNORED_LABEL for token, *bits in zip(ids, *masks, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _check_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Check that the model has a row for every token, and every token a label.

    Raises:
        ActValueError: it has not.
    """
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    padding = tokenizer.pad_token_id or 0
    found = {padding} if padding >= known else set()
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        if len(ids) != len(labels):
            raise ActValueError(f"got {len(labels)} labels for {len(ids)} tokens, expected as many")
        found |= {token for token in {*ids, *labels} - ({IGNORED_LABEL} - {*ids}) if not 0 <= token < known}
    if found:
        raise ActValueError(
            f"the tokenizer {tokenizer.name_or_path!r} gives the token {max(found)}, expected one of the "
            f"model's {known} (the tokenizer belongs to a different model, or a file of it is damaged)"
        )


def _notes(
    prepared: CountedExamples, examples: int, longer: int, lost: int, num_tokens: int, max_length: int
) -> Iterator[str]:
    if prepared.note is not None:
        yield prepared.note
    if prepared.without_answer:
        yield f"{prepared.without_answer} of {examples} examples have an empty answer and are left out"
    if longer:
        rest = f"; {lost} of them lose their whole answer and are left out" if lost else ""
        yield f"{longer} of {examples} examples are longer than {max_length} tokens and are cut off{rest}"
    elif lost:
        yield f"{lost} of {examples} examples have no counted token and are left out"
    if num_tokens < FEW_TOKENS:
        yield f"only {num_tokens} answer tokens, so all figures are rough"
