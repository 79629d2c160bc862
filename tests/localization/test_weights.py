import math

import pytest
import torch
from torch import nn

from act_peft import ActValueError, ChannelScores
from act_peft.channels.kinds import channel_kind
from tests.support.pairs import localize_every


def oracle(base, donor):
    """The norm as a loop over the numbers of every channel."""
    others, scores = dict(donor.named_modules()), {}
    for name, module in base.named_modules():
        kind = channel_kind(module)
        if kind is None:
            continue
        weight = (others[name].weight.double() - module.weight.double()).detach().movedim(kind.channel_dim, 0)
        squares = [sum(float(value) ** 2 for value in row.flatten()) for row in weight]
        if getattr(module, "bias", None) is not None:
            bias = (others[name].bias.double() - module.bias.double()).detach()
            squares = [square + float(value) ** 2 for square, value in zip(squares, bias, strict=True)]
        scores[name] = [math.sqrt(square) for square in squares]
    return scores


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3"])
def test_the_norm_of_the_change(family, pair):
    base, donor = pair(family)
    before = [p.detach().clone() for model in (base, donor) for p in model.parameters()]
    scores, expected = localize_every(base, donor, score="weight"), oracle(base, donor)
    assert list(scores) == list(expected)
    for name in scores:
        assert scores[name].dtype == torch.float64
        assert scores[name].tolist() == pytest.approx(expected[name], rel=1e-6)
    assert scores.num_tokens == 0
    after = [p for model in (base, donor) for p in model.parameters()]
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, after, strict=True))


def test_narrow_types_and_narrowed_modules(pair):
    base, donor = pair()
    base, donor = base.bfloat16(), donor.double()
    scores = localize_every(base, donor, score="weight", target_modules=["q_proj"], exclude_modules=r".*\.1\..*")
    assert list(scores) == ["model.layers.0.self_attn.q_proj"]
    name = next(iter(scores))
    assert scores[name].tolist() == pytest.approx(oracle(base, donor)[name], rel=1e-6)


def test_saved_and_selected(pair, tmp_path):
    scores = localize_every(*pair(), score="weight")
    scores.save(tmp_path / "f")
    assert ChannelScores.load(tmp_path / "f") == scores
    assert scores.top(0.1).num_selected == round(0.1 * sum(scores.num_channels.values()))


def test_weights_that_are_not_finite(pair):
    base, donor = pair()
    with torch.no_grad():
        donor.lm_head.weight[3, 2] = float("nan")
    with pytest.raises(ActValueError, match=r"lm_head: got nan for channel 3, expected finite"):
        localize_every(base, donor, score="weight")


def test_parameters_that_only_one_model_has(toy):
    base, donor = toy(mid=lambda: nn.Linear(6, 6))
    donor.mid = nn.Linear(6, 6, bias=False)
    with pytest.raises(ActValueError, match=r"mid: donor has no bias, the base has bias \[6\], expected the same"):
        localize_every(base, donor, score="weight")
    assert "mid" not in localize_every(base, donor, score="weight", exclude_modules=["mid"])
