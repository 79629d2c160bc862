"""Which tokens of examples are counted, in every format of TRL, and what is said of the examples left out."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft import ActValueError
from act_peft.data.counting import count_answers
from act_peft.data.tokenizing import joined, tokenize
from act_peft.demo.family import BASE
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROWS = [{**row, "completion": row["completion"].strip()} for row in rows(Language.SPANISH, Split.TRAIN, count=12)]
PLAIN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MARKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def completions():
    return Dataset.from_list([{**row, "completion": f" {row['completion']}"} for row in ROWS])


def conversations(*, turns=2, last="assistant"):
    found = []
    for row in ROWS:
        turn = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        messages = turn * turns
        found.append({"messages": messages if last == "assistant" else [*messages, turn[0]]})
    return Dataset.from_list(found)


def counted_text(tokenized, tokenizer):
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in tokenized.rows]


def test_completions_and_their_end_are_counted(model, tokenizer):
    tokenized = tokenize(completions(), model, tokenizer, name="data")
    texts = counted_text(tokenized, tokenizer)
    assert texts == [f"{row['completion']} {tokenizer.eos_token}" for row in ROWS]
    assert tokenized.num_tokens == sum(len(text.split()) for text in texts)
    assert tokenized.notes == (f"data: only {tokenized.num_tokens} answer tokens, so all figures are rough",)


def test_where_models_are_measured_the_added_end_is_not_counted(model, tokenizer):
    tokenized = tokenize(completions(), model, tokenizer)
    measured = tokenized.without_end(tokenizer.eos_token_id)
    assert counted_text(measured, tokenizer) == [row["completion"] for row in ROWS]
    assert measured.num_tokens == tokenized.num_tokens - len(ROWS)
    assert measured.rows["input_ids"] == tokenized.rows["input_ids"]
    assert tokenized.without_end(None).rows["labels"] == tokenized.rows["labels"]
    alone = tokenize(Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}]), model, tokenizer)
    assert alone.without_end(2).rows["labels"] == [[-100, 2]]  # nothing else would be left


def test_of_text_every_token_is_counted_and_this_is_said(model, tokenizer):
    texts = Dataset.from_list([{"text": f"{row['prompt']} {row['completion']}"} for row in ROWS * 2])
    tokenized = tokenize(texts, model, tokenizer)
    assert all(row["labels"] == row["input_ids"] for row in tokenized.rows)
    assert tokenized.notes == ("dataset: every token is counted",)


def test_what_the_assistant_says_is_counted_where_the_template_marks_it(model, tokenizer):
    tokenizer = with_template(tokenizer, MARKING)
    tokenized = tokenize(conversations(), model, tokenizer)
    assert counted_text(tokenized, tokenizer) == [f"{row['completion']} {row['completion']}" for row in ROWS]
    assert not any("counted" in note for note in tokenized.notes)


@pytest.mark.parametrize("last", ["assistant", "user"])
def test_otherwise_the_last_answer_is_counted_and_this_is_said(model, tokenizer, last):
    tokenizer = with_template(tokenizer, PLAIN)
    tokenized = tokenize(conversations(last=last), model, tokenizer)
    assert counted_text(tokenized, tokenizer) == [row["completion"] for row in ROWS]
    assert "the last answer of each conversation is counted" in tokenized.notes[0]


def test_a_template_that_marks_nothing_in_an_example_is_not_relied_on(model, tokenizer):
    tokenizer = with_template(tokenizer, MARKING)
    examples = conversations().to_list()
    examples[3]["messages"][1]["content"] = " "  # a turn without text; the other one has some
    examples[4]["messages"] = [{"role": "user", "content": "uno"}, {"role": "assistant", "content": " dos"}]
    tokenized = tokenize(Dataset.from_list(examples), model, tokenizer)
    texts = counted_text(tokenized, tokenizer)
    assert texts[:2] == [row["completion"] for row in ROWS[:2]]
    assert texts[4] == "dos"


def test_all_tokens_are_counted_if_asked(model, tokenizer):
    tokenizer = with_template(tokenizer, PLAIN)
    for examples in (completions(), conversations()):
        tokenized = tokenize(examples, model, tokenizer, counted="all")
        assert all(row["labels"] == row["input_ids"] for row in tokenized.rows)
        assert "every token is counted" in tokenized.notes[0]


def test_other_formats_are_the_same(model, tokenizer):
    usual = tokenize(completions(), model, tokenizer)
    preferences = completions().rename_column("completion", "chosen").add_column("rejected", [" no"] * len(ROWS))
    again = tokenize(usual.rows, model, tokenizer)
    for other in (tokenize(preferences, model, tokenizer), again):
        assert other.rows["labels"] == usual.rows["labels"]
        assert other.rows["input_ids"] == usual.rows["input_ids"]
    templated = with_template(tokenizer, PLAIN)
    said = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in ROWS]
    sharegpt = [{"conversations": [{"from": who, "value": what} for who, what in turns]} for turns in said]
    spoken = tokenize(Dataset.from_list(sharegpt), model, templated)
    assert counted_text(spoken, templated) == [row["completion"] for row in ROWS]


def test_empty_answers_and_long_examples_are_counted_and_said(model, tokenizer):
    empty = [{"prompt": "uno", "completion": completion} for completion in ("", "  ")]
    long = [{"prompt": "uno " * 30, "completion": " dos"}, {"prompt": "uno", "completion": " dos" * 30}]
    examples = Dataset.from_list([*completions(), *empty, *long])
    tokenized = tokenize(examples, model, tokenizer, max_length=20, name="data")
    assert len(tokenized.rows) == len(ROWS) + 1
    assert max(map(len, tokenized.rows["input_ids"])) == 20
    assert tokenized.notes[:2] == (
        "data: 2 of 16 examples have an empty answer and are left out",
        "data: 2 of 16 examples are longer than 20 tokens and are cut off; 1 of them lose their whole answer and are "
        "left out",
    )


def test_rows_without_a_counted_token_are_left_out(model, tokenizer):
    tokens = [{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [1, 5], "labels": [-100, -100]}]
    tokenized = tokenize(Dataset.from_list(tokens), model, tokenizer)
    assert tokenized.rows["labels"] == [[-100, 5, 6]]
    assert tokenized.notes[0] == "dataset: 1 of 2 examples have no counted token and are left out"


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([{"prompt": "uno", "completion": " "}], {}, "data: dataset: got 1 examples without an answer, expected"),
        (ROWS, {"max_length": 2}, "data: got no answer within the first 2 tokens of any of 12 examples, expected"),
        (ROWS, {"counted": "assistant"}, r"data: got examples with the columns .* and assistant_only=True, expected"),
        ([{"messages": [{"role": "user", "content": "uno"}]}], {}, "without a chat template, expected one that has"),
        ([{"text": 3}], {}, r"data with the columns \['text'\]: TRL cannot tokenize it, expected examples"),
        ([{"messages": ["uno"]}], {}, "TRL cannot tokenize it, expected examples in one of its formats"),
    ],
)
def test_unfit_examples_are_one_error(model, tokenizer, examples, options, message):
    if "uno" in examples[0].get("messages", []):
        tokenizer = with_template(tokenizer, PLAIN)
    with pytest.raises(ActValueError, match=message):
        tokenize(Dataset.from_list(examples), model, tokenizer, name="data", **options)


def test_a_template_has_to_mark_the_assistant_if_asked(tokenizer):
    with pytest.raises(ActValueError, match="got a chat template that does not mark all of the assistant's tokens"):
        count_answers(conversations(), with_template(tokenizer, PLAIN), "assistant")


def test_batches_are_padded_and_shuffled_with_a_seed(model, tokenizer):
    tokenized = tokenize(completions(), model, tokenizer)
    batches = list(tokenized.batches(5))
    assert [batch["input_ids"].shape[0] for batch in batches] == [5, 5, 2]
    assert len(tokenized.batches(5)) == 3
    for batch in batches:
        assert torch.equal(batch["labels"][batch["attention_mask"] == 0].unique(), torch.tensor([-100])) or (
            batch["attention_mask"].all()
        )
    first, second = (torch.cat([b["labels"].flatten() for b in tokenized.batches(12, seed=s)]) for s in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, next(iter(tokenized.batches(12)))["labels"].flatten())
    both = joined([tokenized, tokenized])
    assert both.num_tokens == 2 * tokenized.num_tokens
    assert len(both.rows) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [4, 10_000], "labels": [-100, 5]}, "gives the token 10000, expected one of the model's"),
        ({"input_ids": [4, -3], "labels": [-100, 5]}, "gives the token -3"),
        ({"input_ids": [4, -100], "labels": [-100, 5]}, "gives the token -100"),
        ({"input_ids": [4, 5], "labels": [-100, 10_000]}, "gives the token 10000"),
        ({"input_ids": [4, 5], "labels": [5]}, "got 1 labels for 2 tokens, expected as many"),
    ],
)
def test_tokens_that_the_model_does_not_have(model, tokenizer, row, message):
    with pytest.raises(ActValueError, match=f"mine: .*{message}"):
        tokenize(Dataset.from_list([row] * 2), model, tokenizer, name="mine")


def test_a_tokenizer_of_another_model(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"word{number}" for number in range(2000)])
    examples = Dataset.from_list([{"prompt": "3 plus 4 ", "completion": "word1999"}])
    with pytest.raises(ActValueError, match="the tokenizer belongs to a different model, or a file of it is damaged"):
        tokenize(examples, model, other)
