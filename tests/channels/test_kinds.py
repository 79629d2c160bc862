import pytest
import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertConfig, BertSelfOutput
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from act_peft.channels.kinds import (
    ChannelKind,
    channel_kind,
    features,
    is_quantized,
    norm_epsilon,
    normalize,
    num_channels,
)
from act_peft.errors import ActTypeError

KINDS = [
    (lambda: nn.Linear(3, 5), ChannelKind.LINEAR, 5),
    (lambda: nn.Linear(3, 5, bias=False), ChannelKind.LINEAR, 5),
    (lambda: Conv1D(5, 3), ChannelKind.CONV1D, 5),
    (lambda: nn.Embedding(7, 5), ChannelKind.EMBEDDING, 5),
    (lambda: Gemma3TextScaledWordEmbedding(7, 5, 0), ChannelKind.EMBEDDING, 5),
    (lambda: nn.LayerNorm(5), ChannelKind.LAYER_NORM, 5),
    (lambda: nn.LayerNorm(5, bias=False), ChannelKind.LAYER_NORM, 5),
    (lambda: CohereLayerNorm(5), ChannelKind.LAYER_NORM, 5),
    (lambda: nn.RMSNorm(5), ChannelKind.RMS_NORM, 5),
    (lambda: LlamaRMSNorm(5), ChannelKind.RMS_NORM, 5),
    (lambda: Qwen3RMSNorm(5), ChannelKind.RMS_NORM, 5),
    (lambda: Gemma3RMSNorm(5), ChannelKind.RMS_NORM, 5),
    (lambda: T5LayerNorm(5), ChannelKind.RMS_NORM, 5),
]


@pytest.mark.parametrize(("build", "kind", "channels"), KINDS)
def test_kinds(build, kind, channels):
    module = build()
    assert channel_kind(module) is kind
    assert num_channels(module) == channels
    assert channel_kind(module.to(torch.bfloat16)) is kind


@pytest.mark.parametrize(("build", "kind", "channels"), KINDS)
def test_channel_dim_is_the_axis_of_the_channels(build, kind, channels):
    module = build()
    assert (kind.axis_of("weight"), kind.axis_of("bias")) == (kind.channel_dim, 0)
    index = torch.tensor([1, 3])
    x = torch.randint(7, (4,)) if kind is ChannelKind.EMBEDDING else torch.randn(4, 5 if kind.is_norm else 3)
    with torch.no_grad():
        before = module(x)
        module.weight.index_add_(
            kind.channel_dim, index, torch.ones_like(module.weight).index_select(kind.channel_dim, index)
        )
        changed = (module(x) != before).any(0)
    assert changed.nonzero().flatten().tolist() == index.tolist()


def other(forward):
    """A module with a 1-D weight that computes something else."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    Other.forward = lambda self, x: forward(x, self.weight)
    return Other()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.PReLU(4),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.LayerNorm((2, 4)),
        lambda: nn.LayerNorm(4, elementwise_affine=False),
        lambda: nn.Conv1d(4, 4, 1),
        lambda: nn.Embedding(4, 4, max_norm=1.0),
        lambda: nn.ReLU(),
        lambda: nn.LSTM(4, 4),
        lambda: BertSelfOutput(BertConfig(hidden_size=4, num_attention_heads=2)),
        lambda: other(lambda x, weight: x * weight),
        lambda: other(lambda x, weight: x / x.abs().amax(-1, keepdim=True) * weight),
        lambda: other(lambda x, weight: (x * weight).sum(-1)),
        lambda: other(lambda x, weight: (x, weight)),
    ],
)
def test_no_kind(build):
    module = build()
    assert channel_kind(module) is None
    with pytest.raises(ActTypeError, match=r"has no channels, expected a linear, Conv1D, embedding or norm module"):
        num_channels(module)


class CodesOfTorchao(torch.Tensor):
    __module__ = "torchao.quantization"


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 1, dtype=torch.uint8),  # packed
        torch.zeros(5, 3, dtype=torch.int8),
        torch.zeros(5, 3).to(torch.float8_e4m3fn),
        torch.zeros(5, 3).as_subclass(CodesOfTorchao),
    ],
    ids=["packed", "int8", "float8", "torchao"],
)
def test_a_linear_layer_with_a_quantized_weight_has_its_outputs_as_channels(weight):
    module = nn.Linear(3, 5)
    assert not is_quantized(module)
    module.weight = nn.Parameter(weight, requires_grad=False)
    assert is_quantized(module)
    assert channel_kind(module) is ChannelKind.LINEAR
    assert features(module) == (3, 5)
    assert num_channels(module) == 5


def test_other_modules_with_a_quantized_weight_have_no_channels():
    module = nn.Embedding(4, 3)
    module.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert channel_kind(module) is None
    assert not is_quantized(nn.ReLU())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: nn.Linear(3, 5), (3, 5)),
        (lambda: Conv1D(5, 3), (3, 5)),
        (lambda: nn.Embedding(3, 5), (3, 5)),
        (lambda: nn.LayerNorm(5), (5, 5)),
    ],
)
def test_features(build, expected):
    assert features(build()) == expected


def fresh_norm():
    """A norm of a class that has not been seen before."""

    class FreshNorm(LlamaRMSNorm):
        pass

    return FreshNorm(4)


def test_the_users_module_is_not_touched():
    module, calls = fresh_norm(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    before = module.weight.detach().clone()
    state = torch.get_rng_state()
    assert channel_kind(module) is ChannelKind.RMS_NORM
    assert calls == []
    assert torch.equal(module.weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_defaults_do_not_matter():
    default = torch.get_default_dtype()
    module = fresh_norm()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            assert channel_kind(module) is ChannelKind.RMS_NORM
            assert channel_kind(fresh_norm()) is ChannelKind.RMS_NORM
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize(
    ("build", "epsilon"),
    [
        (lambda: nn.LayerNorm(4, eps=1e-3), 1e-3),
        (lambda: LlamaRMSNorm(4, eps=1e-3), 1e-3),
        (lambda: T5LayerNorm(4, eps=1e-3), 1e-3),
        (lambda: nn.RMSNorm(4), torch.finfo(torch.float32).eps),
        (lambda: nn.ReLU(), 0.0),
    ],
)
def test_norm_epsilon(build, epsilon):
    assert norm_epsilon(build()) == epsilon


@pytest.mark.parametrize(
    ("build", "kind"),
    [(lambda: nn.LayerNorm(5), ChannelKind.LAYER_NORM), (lambda: nn.RMSNorm(5), ChannelKind.RMS_NORM)],
)
def test_normalize(build, kind):
    module, x = build(), torch.randn(3, 5)
    torch.testing.assert_close(normalize(x, kind, norm_epsilon(module)), module(x))
    assert normalize(x.bfloat16(), kind, 0.0).dtype == torch.float32
    assert normalize(x.double(), kind, 0.0).dtype == torch.float64
