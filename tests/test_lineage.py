from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import build

from act_peft import ActValueError, ActWarning
from act_peft.lineage import RELATED, Resemblance, check_configs, check_shapes


def test_relatives_have_nothing_to_say():
    assert check_configs(build("llama").config, build("llama", seed=1).config) == []


def test_harmless_differences_come_back_in_words():
    notes = check_configs(build("llama").config, build("llama", max_position_embeddings=128).config)
    assert notes == ["max_position_embeddings is 128 in the donor and 64 in the base"]


@pytest.mark.parametrize(
    ("donor", "match"), [("qwen2", "model_type: the donor's architecture is qwen2"), ("gpt2", "architecture is gpt2")]
)
def test_another_architecture_is_refused(donor, match):
    with pytest.raises(ActValueError, match=match):
        check_configs(build("llama").config, build(donor).config)


def test_shapes_that_differ_are_named():
    base = {"a.weight": [2, 3], "b.weight": [4]}
    check_shapes(base, dict(base), donor_name="donor")
    with pytest.raises(
        ActValueError, match=r"b: donor has weight \[5\], the base has weight \[4\] .*; 1 of 2 tensors"
    ):
        check_shapes(base, {**base, "b.weight": [5]}, donor_name="donor")
    with pytest.raises(ActValueError, match=r"a: donor has bias \[2\], the base has no bias .*; 1 of 3 tensors"):
        check_shapes(base, {**base, "a.bias": [2]}, donor_name="donor")


@pytest.mark.parametrize(("angle", "related"), [(0.0, True), (1.0, True), (1.1, False), (3.0, False)])
def test_the_cosine_decides_what_looks_unrelated(angle, related):
    base = torch.tensor([[1.0, 0.0]])
    donor = torch.tensor([[torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))]])
    assert (float(donor[0, 0]) >= RELATED) == related
    resemblance = Resemblance()
    resemblance.add_("module", base, donor)
    resemblance.add_("norm", torch.ones(2), -torch.ones(2))  # vectors do not count
    if related:
        resemblance.warn([], stacklevel=1)  # a warning would be an error
        return
    with pytest.warns(ActWarning, match=r"a note; the selected weights have a cosine of"):
        resemblance.warn(["a note"], stacklevel=1)


def test_nothing_counted_is_nothing_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Resemblance().warn([], stacklevel=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_refused(value):
    with pytest.raises(ActValueError, match="module: the donor's selected weights hold NaN or infinity"):
        Resemblance().add_("module", torch.ones(2), torch.tensor([1.0, value]))


def test_large_finite_weights_are_not_broken():
    Resemblance().add_("module", torch.ones(2), torch.tensor([3e38, 3e38]))
