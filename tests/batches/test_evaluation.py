import pytest
import torch
from torch import nn

from act_peft.batches.evaluation import evaluation


def flags(model):
    return [module.training for module in model.modules()]


@pytest.fixture
def model():
    built = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    built[1][0].eval()
    return built


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_comes_back(model, error):
    other = nn.Sequential(nn.Linear(2, 2), model)  # shares modules with the first
    before, rng = flags(other), torch.get_rng_state()

    def work():
        with evaluation(model, other):
            assert not any(flags(other))
            assert not torch.is_grad_enabled()
            torch.rand(3)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert flags(other) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_mixed_modes_come_back(model):
    before = flags(model)
    assert len(set(before)) == 2
    with evaluation(model):
        pass
    assert flags(model) == before


def test_an_overridden_eval_is_not_called(model):
    model.train = lambda mode=True: pytest.fail("called")
    with evaluation(model):
        assert not any(flags(model))
