from __future__ import annotations

import pytest
import torch

from act_peft.sweeps.methods import WEIGHT_RULES, Method
from act_peft.sweeps.weight_rules import (
    Dare,
    Interpolation,
    LayerScaling,
    LayerSwap,
    Ties,
    count_layers,
    default_rules,
    layer_of,
)
from tests.support.tiny_models import FAMILIES, build

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(5)), "model.norm.weight"]
D = torch.tensor([[1.0, -4.0, 2.0], [0.5, 3.0, -0.25]])


def factors(rule):
    """What D is multiplied by in every parameter."""
    return [float(rule(name, torch.ones(1))) for name in NAMES]


@pytest.mark.parametrize(("family", "layers"), [(family, 2) for family in FAMILIES])
def test_layers_of_real_names(family, layers):
    names = [name for name, _ in build(family).named_parameters()]
    assert count_layers(names) == layers
    assert {layer_of(name) for name in names} == {None, 0, 1}


def test_without_layers():
    assert count_layers(["embed.weight", "head.weight"]) == 0


def test_rules_by_layers():
    assert factors(Interpolation(0.4)) == [pytest.approx(0.4)] * 7
    assert factors(LayerSwap(1, 2, 5)) == [0, 1, 0, 0, 1, 1, 0]
    assert factors(LayerScaling(0.2, 0.6, 5)) == pytest.approx([0.4, 0.2, 0.3, 0.4, 0.5, 0.6, 0.4])
    assert factors(LayerScaling(0.2, 0.6, 1))[1] == pytest.approx(0.4)


def test_ties_keeps_the_largest():
    assert torch.equal(Ties(0.5, 0.5)("a", D), torch.tensor([[0.0, -2.0, 1.0], [0.0, 1.5, 0.0]]))
    assert torch.equal(Ties(1.0, 0.01)("a", D), torch.tensor([[0.0, -4.0, 0.0], [0.0, 0.0, 0.0]]))


def test_dare_keeps_the_mean_and_does_not_depend_on_the_order():
    rule = Dare(0.5, 0.25)
    large = torch.ones(200, 200)
    change = rule("a", large)
    assert set(change.flatten().tolist()) == {0.0, 2.0}
    assert float(change.mean()) == pytest.approx(0.5, abs=0.02)
    rule("b", large)
    assert torch.equal(rule("a", large), change)
    assert not torch.equal(rule("b", large), change)
    assert not torch.equal(Dare(0.5, 0.25, seed=1)("a", large), change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_dtype_stay(dtype):
    for rule in default_rules(WEIGHT_RULES, scales=[0.3], num_layers=5):
        change = rule(NAMES[1], D.to(dtype))
        assert (change.shape, change.dtype) == (D.shape, dtype)


def test_the_rules_of_a_sweep():
    rules = default_rules(WEIGHT_RULES, scales=[0.2, 0.8], num_layers=5)
    assert [r.settings for r in rules if r.method is Method.INTERPOLATION] == [{"scale": 0.2}, {"scale": 0.8}]
    assert [r.settings for r in rules if r.method is Method.LAYER_SWAP] == [
        {"first": 1, "last": 0},
        {"first": 0, "last": 1},
    ]
    assert [(r.settings, r.factor) for r in rules if r.method is Method.LINES] == [
        ({"first": 0.0, "last": 0.4}, 0.2),
        ({"first": 0.1, "last": pytest.approx(0.3)}, pytest.approx(0.2)),
    ]
    assert [(r.share, r.factor) for r in rules if r.method in (Method.TIES, Method.DARE)] == [
        (0.5, 0.2),
        (0.5, 0.8),
    ] * 2
    assert {rule.method for rule in default_rules(WEIGHT_RULES, scales=[0.2], num_layers=1)} == {
        Method.INTERPOLATION,
        Method.TIES,
        Method.DARE,
    }
    assert default_rules([Method.FITTED], scales=[0.2], num_layers=5) == []
    assert LayerSwap(1, 0, 5).share == pytest.approx(0.2)
    assert LayerSwap(1, 0, 5).factor == Interpolation(0.3).share == 1
