"""Models side by side: loss, accuracy and flips against numbers made by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from act_peft import ActTypeError, ActValueError, Evaluation, evaluate


class Fixed(nn.Module):
    """Gives the logits of a table: for every token the next one."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table), requires_grad=False)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids])


GOOD = [[0.0, 5.0, 0.0], [0.0, 0.0, 5.0], [5.0, 0.0, 0.0]]  # 0 -> 1 -> 2 -> 0
BAD = [[0.0, 5.0, 0.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0]]  # 1 -> 0
OTHER = [[0.0, 0.0, 5.0], [0.0, 0.0, 5.0], [5.0, 0.0, 0.0]]  # 0 -> 2
BATCHES = [
    {"input_ids": torch.tensor([[0, 1], [1, 2]]), "labels": torch.tensor([[-100, 1], [-100, 2]])},
    {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[-100, 1, 2]])},
]


def test_figures_are_those_made_by_hand():
    found = evaluate({"base": Fixed(BAD), "new": Fixed(GOOD), "other": Fixed(OTHER)}, {"skill": BATCHES})
    right = float(-F.log_softmax(torch.tensor([5.0, 0.0, 0.0]), 0)[0])
    base, new = found.results["base"]["skill"], found.results["new"]["skill"]
    assert base.loss == pytest.approx((2 * right + 2 * (right + 5)) / 4, abs=1e-6)
    assert new.loss == pytest.approx(right, abs=1e-6)
    assert (base.accuracy, new.accuracy, base.num_tokens) == (0.5, 1.0, 4)
    assert vars(found.flips("new", "skill")) == {"wrong_to_right": 2, "right_to_wrong": 0}
    assert vars(found.flips("other", "skill")) == {"wrong_to_right": 1, "right_to_wrong": 1}
    lines = str(found).splitlines()
    assert lines[3].split()[:6] == ["skill", "base", "3", "4", f"{base.loss:.3f}", "±"]
    assert lines[4].endswith("3  +2 -0")


def test_plain_values_are_whole():
    found = evaluate({"base": Fixed(BAD), "new": Fixed(GOOD)}, {"skill": BATCHES})
    again = Evaluation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert str(again) == str(found)
    bare = {"loss": 1.0, "accuracy": 0.5}
    unknown = Evaluation.from_dict({"base": {"skill": bare}, "new": {"skill": bare}})
    assert unknown.flips("new", "skill") is None
    assert "+0.000" in str(unknown)


@pytest.mark.parametrize(
    ("models", "skills", "error", "message"),
    [
        ([], {"a": BATCHES}, ActTypeError, "models: got list, expected a dict"),
        ({}, {"a": BATCHES}, ActValueError, "models: got none, expected at least one"),
        ({"base": Fixed(BAD)}, BATCHES, ActTypeError, "skills: got list, expected a dict"),
        ({"base": Fixed(BAD)}, {}, ActValueError, "skills: got none"),
        ({"base": "base"}, {"a": BATCHES}, ActTypeError, "models: 'base': got str, expected a torch.nn.Module"),
        ({"base": Fixed(BAD)}, {"a": []}, ActValueError, "skills: 'a': got no batch"),
    ],
)
def test_unfit_arguments(models, skills, error, message):
    with pytest.raises(error, match=message):
        evaluate(models, skills)
