import pytest
from torch import nn

from act_peft.errors import ActValueError
from act_peft.localization.candidates import find_candidates


def test_all_linear_leaves_the_output_layer_out(pair):
    base, donor = pair()
    expected = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(expected) == 14
    for word in ("all-linear", "ALL-LINEAR"):
        assert list(find_candidates(base, donor, target_modules=word).base) == expected
    without = find_candidates(base, donor, target_modules="all-linear", exclude_modules=["down_proj"])
    assert list(without.base) == [name for name in expected if "down_proj" not in name]


def test_all_linear_knows_conv1d_and_models_without_output_layer(pair, toy):
    assert len(find_candidates(*pair("gpt2"), target_modules="all-linear").base) == 8
    assert list(find_candidates(*toy(), target_modules="all-linear").base) == ["head"]


def test_what_is_found(toy):
    base, donor = toy(mid=lambda: nn.Linear(6, 7), act=lambda: nn.ReLU(), group=lambda: nn.GroupNorm(2, 6))
    found = find_candidates(base, donor)
    assert found.num_channels == {"embed": 6, "mid": 7, "head": 5}
    assert found.base == {"embed": base.embed, "mid": base.mid, "head": base.head}
    assert found.donor == {"embed": donor.embed, "mid": donor.mid, "head": donor.head}
    assert found.embeddings == {"embed"}


@pytest.mark.parametrize(("target", "exclude"), [(["nothing"], None), (None, ".*"), ("mid", ["mid"])])
def test_nothing_left(toy, target, exclude):
    with pytest.raises(
        ActValueError, match=r"target_modules: got .* leaves no module .*\(the base has: embed, head\)"
    ):
        find_candidates(*toy(), target_modules=target, exclude_modules=exclude)


def test_a_module_that_only_one_model_has(toy):
    base, donor = toy()
    donor.extra = nn.Linear(6, 3)
    with pytest.raises(
        ActValueError, match=r"extra: donor has 3 channels \(weight \[3, 6\]\), the base has no such module"
    ):
        find_candidates(base, donor)
    with pytest.raises(
        ActValueError, match=r"extra: donor has no such module, the base has 3 .*\(1 of 3 modules differ"
    ):
        find_candidates(donor, base)
    assert list(find_candidates(base, donor, exclude_modules=["extra"]).base) == ["embed", "head"]


def test_other_numbers_of_channels(toy):
    base, donor = toy()
    donor.head = nn.Linear(6, 9)
    with pytest.raises(
        ActValueError,
        match=r"head: donor has 9 channels \(weight \[9, 6\]\), the base has 5 channels \(weight \[5, 6\]\) \(1 of 2",
    ):
        find_candidates(base, donor)
