from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig

from act_peft import ActValueError
from act_peft.transfer.lineage import RELATED, Resemblance, check_configs, check_shapes
from tests.support.tiny_models import build


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


def test_the_text_part_of_a_multimodal_model_may_be_the_donor():
    wrapper = LlavaConfig(text_config=build("llama").config.to_dict())
    assert check_configs(build("llama").config, wrapper) == []
    wrapper = LlavaConfig(text_config=build("qwen2").config.to_dict())
    assert check_configs(build("llama").config, wrapper) == ["the donor is a qwen2, the base a llama"]


def test_parts_without_a_counterpart_may_be_missing_unless_they_are_needed():
    layers = {"layers.0.q.weight": [2], "layers.1.q.weight": [2]}
    head = {"head.weight": [5, 2]}
    check_shapes({**layers, **head}, layers, donor_name="donor")
    check_shapes(layers, {**layers, **head, "vision.weight": [3]}, donor_name="donor")
    with pytest.raises(ActValueError, match="head: donor has no weight"):
        check_shapes({**layers, **head}, layers, donor_name="donor", needed=["head.weight"])
    with pytest.raises(ActValueError, match=r"layers\.1\.q: donor has no weight"):
        check_shapes(layers, {"layers.0.q.weight": [2]}, donor_name="donor")


def test_the_vocabulary_may_have_another_length():
    check_shapes({"head.weight": [5, 2]}, {"head.weight": [7, 2]}, donor_name="donor", vocabulary=["head.weight"])
    with pytest.raises(ActValueError, match=r"head: donor has weight \[7, 3\], the base has weight \[5, 2\]"):
        check_shapes({"head.weight": [5, 2]}, {"head.weight": [7, 3]}, donor_name="donor", vocabulary=["head.weight"])


@pytest.mark.parametrize(("angle", "related"), [(0.0, True), (1.0, True), (1.1, False), (3.0, False)])
def test_the_cosine_decides_what_looks_unrelated(angle, related):
    base = torch.tensor([[1.0, 0.0]])
    donor = torch.tensor([[torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))]])
    assert (float(donor[0, 0]) >= RELATED) == related
    resemblance = Resemblance()
    resemblance.add_("module", base, donor - base)
    resemblance.add_("norm", torch.ones(2), -2 * torch.ones(2))  # vectors do not count
    notes = resemblance.notes()
    assert len(notes) == (not related)
    if notes:
        assert "the selected weights have a cosine of" in notes[0]


def test_nothing_counted_is_nothing_said():
    assert Resemblance().notes() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_refused(value):
    broken = torch.tensor([1.0, value])
    with pytest.raises(ActValueError, match="module: the donor's selected weights hold NaN or infinity"):
        Resemblance().add_("module", torch.ones(2), broken)
    with pytest.raises(ActValueError, match="module: the base's selected weights hold NaN or infinity"):
        Resemblance().add_("module", broken, torch.ones(2) - broken)


def test_large_finite_weights_are_not_broken():
    Resemblance().add_("module", torch.ones(2), torch.tensor([3e38, 3e38]))
