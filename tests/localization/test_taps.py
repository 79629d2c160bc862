import pytest
import torch
from torch import nn

from act_peft.localization.comparison import tap_outputs


def build():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


def test_sees_outputs_of_the_chosen_modules_only():
    model, seen = build(), []
    x = torch.randn(4, 2)
    with tap_outputs(
        {"last": model[2], "first": model[0]}, lambda name, args, output: seen.append((name, args, output))
    ):
        result = model(x)
    assert [name for name, _, _ in seen] == ["first", "last"]
    assert seen[0][1][0] is x
    assert seen[1][2] is result
    model(x)
    assert len(seen) == 2


def test_leaves_hooks_of_others_alone():
    model, order = build(), []
    model[0].register_forward_hook(lambda *_: order.append("before"))
    with tap_outputs({"a": model[0]}, lambda *_: order.append("tap")):
        model[0].register_forward_hook(lambda *_: order.append("during"))
        model(torch.randn(1, 2))
    assert order == ["before", "tap", "during"]
    model(torch.randn(1, 2))
    assert order[3:] == ["before", "during"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(error):
    model = build()

    def fail(*_):
        raise error

    with pytest.raises(error), tap_outputs(dict(model.named_children()), fail):
        model(torch.randn(1, 2))
    assert all(not module._forward_hooks for module in model.modules())


def test_nothing_is_left_when_registering_fails():
    model = build()
    with pytest.raises(AttributeError), tap_outputs({"a": model[0], "b": None}, print):
        pass
    assert not model[0]._forward_hooks


def test_outputs_are_not_replaced():
    model = build()
    x = torch.randn(1, 2)
    expected = model(x)
    with tap_outputs({"a": model[0]}, lambda *_: "ignored"):
        assert torch.equal(model(x), expected)


def test_compiled_code_runs_again_after_contexts_that_end_in_any_order():
    seen = []
    module = torch.compile(nn.Linear(2, 2), backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    first, second = (tap_outputs({}, lambda *_: None) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    module(torch.ones(1, 2))
    assert not seen
    second.__exit__(None, None, None)
    module(torch.ones(1, 2))
    assert len(seen) == 1
