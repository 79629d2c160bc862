import pytest
import torch

from act_peft.localization.attribution import InterpolatedModel
from act_peft.localization.candidates import find_candidates
from act_peft.localization.weights import parameter_pairs


@pytest.fixture
def line(pair):
    """A function that builds base, donor and the line between them, with what gradients were handed over."""

    def build(family="llama", **targets):
        base, donor = pair(family)
        seen = []
        pairs = parameter_pairs(find_candidates(base, donor, **targets))
        made = InterpolatedModel(base, pairs, lambda name, gradient, part: seen.append((name, part.part, gradient)))
        return base, donor, made, seen

    return build


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_candidates_move_and_the_rest_stays(alpha, line):
    base, donor, made, _ = line(target_modules=["q_proj", "norm"])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    made.move_(0.7)
    made.move_(alpha)
    moved, ends = made.model.state_dict(), donor.state_dict()
    for name, start in before.items():
        expected = start + alpha * (ends[name] - start) if ".q_proj." in name or name == "model.norm.weight" else start
        torch.testing.assert_close(moved[name], expected)
        assert torch.equal(base.state_dict()[name], start)


def test_tied_weights_are_moved_apart(line):
    base, _, made, _ = line("gpt2", target_modules=["lm_head"])
    made.move_(0.5)
    assert torch.equal(made.model.transformer.wte.weight, base.transformer.wte.weight)
    assert not torch.equal(made.model.lm_head.weight, base.lm_head.weight)


def test_gradients_are_handed_over_and_freed(line, batches):
    _, _, made, seen = line("qwen2", target_modules=["q_proj", "lm_head"])
    made.model(**batches[0]).loss.backward()
    assert sorted((name.rpartition(".")[2], part) for name, part, _ in seen) == sorted(
        [("q_proj", "weight"), ("q_proj", "bias")] * 2 + [("lm_head", "weight")]
    )
    assert all(gradient.any() for _, _, gradient in seen)
    assert all(parameter.grad is None for parameter in made.model.parameters())
