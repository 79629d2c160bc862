import pytest
import torch
from torch import nn

from act_peft.demo.task import MAX_ANSWER_TOKENS, Split, accuracy, pairs, row, rows
from act_peft.demo.words import Language
from act_peft.errors import ActValueError
from tests.support.family_training import build_tokenizer


class Recital(nn.Module):
    """Answers every prompt from a table, one after the other, whatever the batches are."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.seen = []

    def generate(self, *, input_ids, attention_mask, max_new_tokens, **_):
        assert not self.training
        self.seen.append((input_ids, attention_mask))
        answers = [self.answers.pop(0) + self.tokenizer.eos_token for _ in input_ids]
        encoded = self.tokenizer(answers, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
        assert encoded.shape[1] <= max_new_tokens
        return torch.cat([input_ids, encoded], dim=1)


def test_split_sizes():
    assert {split: len(pairs(split)) for split in Split} == {Split.TRAIN: 4050, Split.VALIDATION: 500, Split.TEST: 500}


def test_splits_are_disjoint_and_cover_all_sums():
    chosen = [pair for split in Split for pair in pairs(split)]
    assert len(chosen) == len(set(chosen)) == 5050
    assert set(chosen) == {(a, b) for a in range(100) for b in range(100) if a + b <= 99}


def test_split_never_changes():
    assert [pairs(split)[0] for split in Split] == [(1, 49), (32, 33), (34, 0)]


def test_same_pairs_in_every_language():
    for language in Language:
        assert rows(language, Split.TEST) == [row(a, b, language) for a, b in pairs(Split.TEST)]


def test_row_format():
    assert row(42, 17, Language.GERMAN) == {
        "prompt": "zwei und vierzig plus siebzehn gleich",
        "completion": " neun und fuenfzig",
    }
    assert row(2, 3, Language.ENGLISH) == {"prompt": "two plus three equals", "completion": " five"}
    assert row(2, 3, Language.SPANISH) == {"prompt": "dos mas tres igual", "completion": " cinco"}


def test_count_takes_the_start_of_the_split():
    assert rows(Language.SPANISH, Split.TRAIN, count=7) == rows(Language.SPANISH, Split.TRAIN)[:7]
    assert rows(Language.SPANISH, Split.TRAIN, count=0) == []


@pytest.mark.parametrize("count", [-1, 501])
def test_too_many_rows_are_refused(count):
    with pytest.raises(ActValueError, match=rf"rows: got count={count}, expected 0 to 500 \(the test split\)"):
        rows(Language.SPANISH, Split.TEST, count=count)


def test_longest_answer_fits():
    tokenizer = build_tokenizer()
    for language in Language:
        for split in Split:
            answers = [r["completion"] + tokenizer.eos_token for r in rows(language, split)]
            lengths = [len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]
            assert max(lengths) <= MAX_ANSWER_TOKENS


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_counts_whole_answers(batch_size):
    tokenizer = build_tokenizer()
    problems = rows(Language.GERMAN, Split.VALIDATION, count=8)
    answers = [problem["completion"] for problem in problems]
    answers[2] = " null"
    answers[5] = answers[5].rsplit(" ", 1)[0] + " und"
    model = Recital(tokenizer, answers).train()
    assert accuracy(model, tokenizer, problems, batch_size=batch_size) == 6 / 8
    assert model.training


def test_accuracy_pads_prompts_on_the_left_after_bos():
    tokenizer = build_tokenizer()
    problems = [row(2, 3, Language.GERMAN), row(42, 17, Language.GERMAN)]
    model = Recital(tokenizer, [problem["completion"] for problem in problems])
    accuracy(model, tokenizer, problems)
    [(ids, mask)] = model.seen
    texts = [tokenizer.decode(line[keep.bool()]) for line, keep in zip(ids, mask, strict=True)]
    assert texts == [f"{tokenizer.bos_token} {problem['prompt']}" for problem in problems]
    assert mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert mask[1].tolist() == [1] * 7
    assert tokenizer.padding_side == "right"


def test_accuracy_of_nothing_is_refused():
    with pytest.raises(ActValueError, match="accuracy: got no rows, expected at least one"):
        accuracy(nn.Linear(1, 1), build_tokenizer(), [])
