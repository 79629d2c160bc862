"""What each kind of layer computes, by hand-made numbers and by its own merged weight."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from act_peft import ActConfig
from act_peft.layers import ActLayer
from act_peft.layers.base import ActLayer as Base


class One(nn.Module):
    """A model of one module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def wrap(module, channels, *, weight=None, bias=None, **settings) -> One:
    model = get_peft_model(One(module), ActConfig(channels={"module": channels}, **settings))
    layer = model.base_model.model.module
    with torch.no_grad():
        if weight is not None:
            layer.act_delta_weight["default"].copy_(torch.as_tensor(weight))
        if bias is not None:
            layer.act_delta_bias["default"].copy_(torch.as_tensor(bias))
    return model.base_model.model


def linear(out=3, bias=True):
    module = nn.Linear(2, out, bias=bias)
    with torch.no_grad():
        module.weight.copy_(torch.arange(1.0, 2 * out + 1).reshape(out, 2))
        if bias:
            module.bias.copy_(torch.arange(10.0, 10 + out))
    return module


def test_linear_by_hand():
    model = wrap(linear(), [2, 0], weight=[[1.0, -1.0], [2.0, 3.0]], bias=[0.5, -0.5])
    x = torch.tensor([[1.0, 2.0]])
    # base: rows (1, 2), (3, 4), (5, 6) and biases 10, 11, 12; deltas on rows 0 and 2
    expected = [[1 + 4 + 10 + (1 - 2) + 0.5, 3 + 8 + 11, 5 + 12 + 12 + (2 + 6) - 0.5]]
    assert torch.equal(model(x), torch.tensor(expected))


def test_conv1d_by_hand():
    module = Conv1D(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]))
        module.bias.copy_(torch.tensor([10.0, 11.0, 12.0]))
    model = wrap(module, [1], weight=[[2.0], [-1.0]], bias=[7.0])
    assert torch.equal(model(torch.tensor([[1.0, 2.0]])), torch.tensor([[15.0, 3 + 8 + 11 + 0 + 7.0, 29.0]]))


def test_embedding_by_hand():
    module = nn.Embedding(3, 2, padding_idx=0)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]))
    model = wrap(module, [1], weight=[[9.0], [10.0], [20.0]])
    assert torch.equal(model(torch.tensor([[2, 1, 0]])), torch.tensor([[[3.0, 24.0], [1.0, 12.0], [0.0, 9.0]]]))
    model(torch.tensor([[0, 1]])).sum().backward()
    assert model.module.act_delta_weight["default"].grad.tolist() == [[0.0], [1.0], [0.0]]  # no gradient for padding


def test_norms_by_hand():
    x = torch.tensor([[3.0, -3.0]])  # mean 0, mean square 9
    layer_norm = wrap(nn.LayerNorm(2, eps=0.0), [1], weight=[1.0], bias=[0.25])
    torch.testing.assert_close(layer_norm(x), torch.tensor([[1.0, -2.0 + 0.25]]))
    rms_norm = wrap(LlamaRMSNorm(2, eps=0.0), [0], weight=[0.5])
    torch.testing.assert_close(rms_norm(x), torch.tensor([[1.5, -1.0]]))
    offset = wrap(Gemma3RMSNorm(2, eps=0.0), [0], weight=[0.5])
    torch.testing.assert_close(offset(x), torch.tensor([[1.5, -1.0]]))


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(4, 6)),
    "conv1d": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (2, 3))),
    "scaled embedding": (
        lambda: Gemma3TextScaledWordEmbedding(7, 5, padding_idx=0, embed_scale=2.5),
        lambda: torch.randint(0, 7, (2, 3)),
    ),
    "layer norm": (lambda: nn.LayerNorm(5), lambda: torch.randn(2, 3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), lambda: torch.randn(2, 3, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), lambda: torch.randn(2, 3, 5)),
    "llama norm": (lambda: LlamaRMSNorm(5), lambda: torch.randn(2, 3, 5)),
    "norm with offset": (lambda: Gemma3RMSNorm(5), lambda: torch.randn(2, 3, 5)),
    "norm over heads": (lambda: LlamaRMSNorm(5), lambda: torch.randn(2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("channels", [[0], [1, 3], [0, 1, 2, 3, 4]])
def test_every_kind_agrees_with_its_merged_weight_and_unmerges(name, channels):
    torch.manual_seed(0)
    make, make_input = MODULES[name]
    model, x = wrap(make(), channels, init_weights=False), make_input()
    layer = model.module
    before = {key: tensor.clone() for key, tensor in layer.base_layer.state_dict().items()}
    unmerged = model(x)
    untouched = [i for i in range(5) if i not in channels]
    assert torch.equal(unmerged[..., untouched], layer.base_layer(x)[..., untouched])
    assert not torch.allclose(unmerged[..., channels], layer.base_layer(x)[..., channels])
    layer.merge()
    torch.testing.assert_close(model(x), unmerged)
    dense = layer.get_delta_weight("default")
    torch.testing.assert_close(layer.base_layer.weight.detach(), before["weight"] + dense)
    layer.unmerge()
    assert all(torch.equal(layer.base_layer.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_the_deltas_are_those_of_the_merged_weight(name):
    torch.manual_seed(0)
    make, make_input = MODULES[name]
    channels = [1, 3]
    model, x = wrap(make().double(), channels, init_weights=False), make_input()
    x = x.double() if x.is_floating_point() else x
    layer = model.module
    target = torch.randn(model(x).shape, dtype=torch.float64)
    (model(x) * target).sum().backward()
    layer.merge()
    for parameter in layer.base_layer.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    (model(x) * target).sum().backward()
    base, dim = layer.base_layer, layer.kind.channel_dim
    expected = base.weight.grad.index_select(dim, torch.tensor(channels))
    torch.testing.assert_close(layer.act_delta_weight["default"].grad, expected)
    if layer.has_bias:
        torch.testing.assert_close(layer.act_delta_bias["default"].grad, base.bias.grad[channels])


@pytest.mark.parametrize("name", [n for n in MODULES if "norm" not in n and "embedding" not in n])
def test_gradients_reach_the_input(name):
    torch.manual_seed(0)
    make, make_input = MODULES[name]
    model = wrap(make().double(), [1, 3], init_weights=False)
    assert torch.autograd.gradcheck(model, (make_input().double().requires_grad_(),))


def test_the_base_layer_s_hooks_see_and_keep_the_base_output():
    model = wrap(linear(), [0], weight=[[1.0, 1.0]])
    x, seen = torch.tensor([[1.0, 2.0]]), []
    model.module.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    assert torch.equal(seen[0], model.module.base_layer(x))


def test_a_base_output_that_is_a_leaf_is_not_written_to():
    model = wrap(nn.Embedding(4, 3), [1], init_weights=False)
    model.module.base_layer.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.module.act_delta_weight["default"].grad is not None


def test_no_dense_weight_is_built(monkeypatch):
    """The forward never allocates anything of the weight's size (here larger than all activations together)."""
    model = wrap(nn.Linear(64, 64, bias=False), [1, 5], init_weights=False)
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None and "detach" not in str(function):
                sizes.append(0 if str(function).startswith("aten.t.") else result.numel())
            return result

    x = torch.randn(2, 64, requires_grad=True)
    with Record():
        model(x).sum().backward()
    assert max(sizes) < 64 * 64


def test_disabled_and_merged_layers_unmerge_on_the_way():
    model = wrap(linear(), [0], weight=[[1.0, 1.0]])
    x = torch.tensor([[1.0, 2.0]])
    model.module.merge()
    model.module.enable_adapters(False)
    assert torch.equal(model(x), linear()(x))
    assert not model.module.merged


def test_messages_of_merging():
    layer = wrap(linear(), [0]).module
    with pytest.warns(UserWarning, match=r"Already unmerged\. Nothing to do\."):
        layer.unmerge()
    layer.merge()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        layer.merge()


def test_a_layer_class_has_to_say_what_changes():
    layer = wrap(linear(), [0]).module
    with pytest.raises(ValueError, match="Linear: a layer class has to compute `change`"):
        Base.change(layer, torch.ones(1, 2), "default")
    assert ActLayer is Base


def test_features_are_those_of_the_module():
    sizes = dict.fromkeys(("in", "out"), (2, 3))
    assert wrap(linear(), [0]).module.in_features == sizes["in"][0]
    assert wrap(linear(), [0]).module.out_features == sizes["out"][1]
    assert (wrap(Conv1D(3, 2), [0]).module.in_features, wrap(Conv1D(3, 2), [0]).module.out_features) == (2, 3)
    embedding = wrap(nn.Embedding(7, 5), [0]).module
    assert (embedding.in_features, embedding.out_features) == (7, 5)
    norm = wrap(nn.LayerNorm(4), [0]).module
    assert (norm.in_features, norm.out_features) == (4, 4)
