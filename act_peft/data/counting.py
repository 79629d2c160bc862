"""Which tokens of an example are its answer, in each of TRL's formats.

| columns              | what is counted                                                              |
|----------------------|------------------------------------------------------------------------------|
| `prompt`,            | the completion, and the end of the text after it                             |
| `completion`         |                                                                              |
| `prompt`, `chosen`   | the same, of the chosen answer                                               |
| `messages`           | what the assistant says in every turn, if the chat template marks it (or TRL |
|                      | knows a version of the template that does); otherwise its last answer: the   |
|                      | conversation becomes prompt and completion                                   |
| `text`               | every token                                                                  |
| `input_ids`          | by `labels`, `completion_mask` and `assistant_masks`; without, every token   |
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml

from act_peft.errors import ActValueError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Counted(str, Enum):
    """What is counted of each example."""

    ANSWERS = "answers"
    ASSISTANT = "assistant"
    ALL = "all"


@dataclass(frozen=True)
class CountedExamples:
    """Examples in a form in which TRL masks everything but their answers.

    Attributes:
        examples: the examples.
        tokenizer: the tokenizer, with a chat template that marks the assistant's tokens if they are to be found so.
        assistant_only: TRL's `assistant_only_loss`.
        completion_only: TRL's `completion_only_loss`.
        note: what is counted, if it is not what a reader expects; None otherwise.
        without_answer: number of examples that were left out because their answer is empty.
    """

    examples: Dataset
    tokenizer: PreTrainedTokenizerBase
    assistant_only: bool
    completion_only: bool
    note: str | None
    without_answer: int


def count_answers(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    counted: str | Counted = Counted.ANSWERS,
    *,
    by_template: bool = True,
) -> CountedExamples:
    """Prepare examples so that what is to be counted is, see the table above.

    Args:
        examples: a dataset in one of TRL's formats.
        tokenizer: the tokenizer.
        counted: `answers`: by the table; `assistant`: the same, but an error where the template cannot say which
            tokens are the assistant's; `all`: every token.
        by_template: whether the template may say which tokens are the assistant's.

    Raises:
        ActValueError: conversations without a chat template or without an answer; nothing but empty answers;
            `assistant` for examples that are no conversations, or with a template that does not mark the assistant.
    """
    counted = Counted(counted)
    if "conversations" in examples.column_names and "messages" not in examples.column_names:
        examples = examples.map(maybe_convert_to_chatml, remove_columns="conversations")
    if "chosen" in examples.column_names and "completion" not in examples.column_names:
        examples = examples.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    columns = examples.column_names
    conversational = "messages" in columns or ("prompt" in columns and not isinstance(examples[0]["prompt"], str))
    if counted is Counted.ASSISTANT and "messages" not in columns:
        raise ActValueError(
            f"got examples with the columns {columns} and assistant_only=True, expected conversations in a column "
            "'messages' (leave it out: completions are counted without it)"
        )
    if conversational and not tokenizer.chat_template:
        raise ActValueError(
            "dataset: got conversations for a tokenizer without a chat template, expected one that has it (set "
            "tokenizer.chat_template and save the tokenizer with the model, or write the examples as 'prompt' and "
            "'completion')"
        )
    examples, without_answer = _with_answers(examples)
    if "messages" not in columns or counted is Counted.ALL:
        completion_only = "completion" in columns and counted is not Counted.ALL
        note = None if completion_only or "input_ids" in columns else "every token is counted"
        return CountedExamples(examples, tokenizer, False, completion_only, note, without_answer)
    marking = _marking(tokenizer) if by_template else None
    if marking is not None:
        return CountedExamples(examples, marking, True, False, None, without_answer)
    if counted is Counted.ASSISTANT:
        raise ActValueError(
            "got a chat template that does not mark all of the assistant's tokens, expected one with {% generation %} "
            "for assistant_only=True (leave it out: then the last answer of each conversation is counted)"
        )
    note = (
        "the last answer of each conversation is counted (the chat template does not mark all that the assistant "
        "says; {% generation %} would)"
    )
    # Everything after the last answer, a question without an answer for example, is left out.
    split = examples.map(_split_conversation, remove_columns="messages")
    return CountedExamples(split, tokenizer, False, True, note, without_answer)


def _with_answers(examples: Dataset) -> tuple[Dataset, int]:
    """The examples whose answer is not empty, and the number of the others."""
    kept = [number for number, example in enumerate(examples) if _has_answer(example)]
    if not kept:
        raise ActValueError(
            f"dataset: got {len(examples)} examples without an answer, expected at least one with an answer (a "
            "completion, or a message of the assistant, that is not empty)"
        )
    left_out = len(examples) - len(kept)
    return (examples.select(kept), left_out) if left_out else (examples, 0)


def _has_answer(example: Mapping[str, Any]) -> bool:
    if "completion" in example:
        completion = example["completion"]
        if not isinstance(completion, list):
            return bool(str(completion or "").strip())
        return any(_says_something(message) for message in completion)
    if "messages" in example:
        return any(message.get("role") == "assistant" and _says_something(message) for message in example["messages"])
    return "text" not in example or bool(str(example["text"] or "").strip())


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _split_conversation(example: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    messages = example["messages"]
    last = max(number for number, message in enumerate(messages) if message.get("role") == "assistant")
    return {"prompt": messages[:last], "completion": [messages[last]]}


def _marking(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer with a chat template that marks the assistant's tokens; None if there is none."""
    template = tokenizer.chat_template
    if isinstance(template, str) and _MARKER.search(template):
        return tokenizer
    try:
        known = get_training_chat_template(tokenizer)
    except ValueError:  # TRL does not know the template
        return None
    if known is None or not _MARKER.search(known):
        return None
    marking = copy.copy(tokenizer)
    marking.chat_template = known
    return marking
