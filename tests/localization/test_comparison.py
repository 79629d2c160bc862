import pytest
import torch
from torch import nn

from act_peft.batches.answer_tokens import find_answer_tokens
from act_peft.errors import ActValueError
from act_peft.localization.candidates import find_candidates
from act_peft.localization.comparison import BatchComparison

BATCH = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([[-100, 2, 3], [-100, -100, 6]])}


def compare(base, donor):
    comparison = BatchComparison(find_candidates(base, donor, target_modules=".*"), find_answer_tokens(BATCH))
    with torch.no_grad():
        with comparison.reading_base():
            base(**BATCH)
        with comparison.reading_donor():
            donor(**BATCH)
    return comparison.sums()


def test_sums_over_answer_tokens(toy):
    base, donor = toy()
    sums = compare(base, donor)
    difference = (donor.embed.weight - base.embed.weight)[[2, 3, 6]].detach().double().abs()
    torch.testing.assert_close(sums["embed"], torch.stack([difference[:2].sum(0), difference[2]]))  # by sample
    assert list(sums) == ["embed", "head"]


def test_nothing_is_kept_of_the_base(toy):
    base, donor = toy()
    comparison = BatchComparison(find_candidates(base, donor, target_modules=".*"), find_answer_tokens(BATCH))
    with torch.no_grad(), comparison.reading_base():
        base(**BATCH)
    assert {name: [tuple(rows.shape) for rows in calls] for name, calls in comparison._kept.items()} == {
        "embed": [(3, 6)],
        "head": [(3, 5)],
    }
    with torch.no_grad(), comparison.reading_donor():
        donor(**BATCH)
    assert not any(comparison._kept.values())


def test_a_module_that_runs_less_often_in_the_donor(toy):
    base, donor = toy(lambda self, h: self.mid(h), mid=lambda: nn.Linear(6, 6))
    donor.middle = lambda self, h: h
    with pytest.raises(ActValueError, match=r"mid: ran less often in the donor, expected .*equally often.*\['mid'\]"):
        compare(base, donor)
    with pytest.raises(ActValueError, match=r"mid: did not run in the base, expected every candidate to run"):
        compare(donor, base)


def test_a_module_that_runs_more_often_in_the_donor(toy):
    base, donor = toy(lambda self, h: self.mid(h), mid=lambda: nn.Linear(6, 6))
    donor.middle = lambda self, h: self.mid(self.mid(h))
    with pytest.raises(ActValueError, match=r"mid: ran more often in the donor"):
        compare(base, donor)


def test_another_number_of_heads(toy):
    base, donor = toy(lambda self, h: (self.norm(h.view(2, 3, 2, 3)), h)[1], norm=lambda: nn.LayerNorm(3))
    donor.middle = lambda self, h: (self.norm(h.view(2, 3, 2, 3)[:, :, :1]), h)[1]
    with pytest.raises(ActValueError, match=r"norm: donor gave 3 rows, the base 6, expected the same .*\['norm'\]"):
        compare(base, donor)


@pytest.mark.parametrize(
    ("towers", "used", "expected"),
    [
        (["tower"], [], r'(3 of 5 candidates; leave them out with exclude_modules=r"tower\..*")'),
        (["one", "two"], ["one.0", "two.0"], "(4 of 8 candidates; leave them out with exclude_modules=['1', '2'])"),
        (["one"], ["one.0"], "(2 of 5 candidates; leave them out with exclude_modules=['1', '2'])"),
        (
            ["one", "two"],
            ["one.0"],
            "(5 of 8 candidates; leave them out with exclude_modules=['one.1', 'one.2', ...])",
        ),
        (["one"], ["one.0", "one.1"], "(1 of 5 candidates; leave them out with exclude_modules=['one.2'])"),
    ],
)
def test_what_to_exclude_never_names_a_module_that_runs(toy, towers, used, expected):
    def tower():
        return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))

    def middle(self, hidden):
        for name in used:
            hidden = self.get_submodule(name)(hidden)
        return hidden

    with pytest.raises(ActValueError) as caught:
        compare(*toy(middle, **dict.fromkeys(towers, tower)))
    assert str(caught.value).endswith(expected)
