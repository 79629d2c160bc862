import pytest
import torch

from act_peft.errors import ActValueError
from act_peft.localization import sums
from act_peft.localization.sums import ChannelSums, sum_absolute_difference, sum_per_channel


def total_difference(donor, base):
    """The sum over all rows, as those of a single sample."""
    total = sum_absolute_difference(donor, base, torch.zeros(len(donor), dtype=torch.int64), 1)
    assert total.shape == (1, donor.shape[1])
    return total[0]


@pytest.mark.parametrize("elements", [1, 7, 1 << 17])  # rows at a time: one, two, all
def test_sum_absolute_difference(monkeypatch, elements):
    monkeypatch.setattr(sums, "_CPU_ELEMENTS", elements)
    donor = torch.tensor([[1, -2, 3], [4, 5, -6], [0, 1, 0]], dtype=torch.float32)
    base = torch.tensor([[2, 2, 2], [-4, 5, 6], [0, 0, 0]], dtype=torch.float32)
    assert total_difference(donor.clone(), base).tolist() == [9, 5, 13]
    total = sum_absolute_difference(donor, base, torch.tensor([0, 2, 2]), 4)
    assert total.dtype == torch.float64
    assert total.tolist() == [[1, 4, 1], [0, 0, 0], [8, 1, 12], [0, 0, 0]]


@pytest.mark.parametrize("elements", [1, 7, 1 << 17])
@pytest.mark.parametrize("dim", [0, 1])
def test_sum_per_channel(monkeypatch, elements, dim):
    monkeypatch.setattr(sums, "_CPU_ELEMENTS", elements)
    one = torch.tensor([[1, -2, 3], [4, 5, -6], [0, 1, 6]], dtype=torch.bfloat16)
    other = torch.tensor([[3, 4, -3], [1, 1, 1], [7, 0, 2]], dtype=torch.float32)
    kept = one.clone(), other.clone()
    total = sum_per_channel(lambda a, b: a * b, (one, other), channel_dim=dim)
    assert total.dtype == torch.float64
    assert total.tolist() == [sum(row) for row in (one.double() * other.double()).movedim(dim, 0).tolist()]
    assert torch.equal(one, kept[0])
    assert torch.equal(other, kept[1])


def test_sum_per_channel_of_single_numbers():
    assert sum_per_channel(lambda a: a * 2, (torch.tensor([1.0, -3.0]),), channel_dim=0).tolist() == [2, -6]


def test_the_difference_of_narrow_types_is_wide():
    donor, base = torch.full((1, 1), 256.0, dtype=torch.bfloat16), torch.full((1, 1), -1.0, dtype=torch.bfloat16)
    assert total_difference(donor, base).tolist() == [257]  # 256 in bfloat16
    huge = torch.full((3, 1), 6e4, dtype=torch.float16)
    assert total_difference(huge.clone(), -huge).tolist() == [3 * 2 * float(huge[0])]
    fine = torch.ones(1, 1, dtype=torch.float64) + 2.0**-40
    assert total_difference(torch.ones(1, 1), fine).tolist() == [2.0**-40]
    assert total_difference(fine, torch.ones(1, 1)).tolist() == [2.0**-40]


def test_many_rows_do_not_lose_small_differences():
    donor = torch.full((100_000, 1), 1e-3)
    donor[0] = 2.0**24
    expected = donor.double().sum(0)
    torch.testing.assert_close(total_difference(donor, torch.zeros(100_000, 1)), expected, rtol=1e-10, atol=0)


def test_adds_up():
    totals = ChannelSums({"b": 2, "a": 1})
    assert totals.num_tokens == 0
    totals.add_({"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0], dtype=torch.float64)}, 3)
    totals.add_({"b": torch.tensor([1.0, 1.0]), "a": torch.tensor([0.5])}, 4)
    assert totals.num_tokens == 7
    assert {name: (v.tolist(), v.dtype) for name, v in totals.sums.items()} == {
        "b": ([3, 4], torch.float64),
        "a": ([1.5], torch.float64),
    }
    assert list(totals.sums) == ["b", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(value):
    totals = ChannelSums({"b": 2, "a": 1})
    with pytest.raises(ActValueError, match=r"a: got activations whose difference is not finite.*\(1 of 2 modules"):
        totals.add_({"b": torch.ones(2), "a": torch.tensor([value])}, 3)
    assert totals.num_tokens == 0
    assert totals.sums["b"].tolist() == [0, 0]
