"""What the property tests draw: models, masks and adapters; and the weights that they must give (an oracle)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from act_peft import ActConfig, ChannelMask
from act_peft.channels.kinds import ChannelKind, kind_of
from act_peft.layers import ActLayer
from tests.support.tiny_models import FAMILIES, VOCABULARY, batch, build, candidates, state_bytes

NAMES = ("z", "x", "y", "w")  # not in their sorted order
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def holds(examples, **strategies):
    """A test of a property: `examples` of them in every run, ten times as many in a slow one."""

    def decorate(body):
        @pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)], ids=["some", "many"])
        def test(times):
            profile = settings(
                max_examples=examples * times,
                derandomize=True,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )
            profile(given(**strategies)(body))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


# ------------------------------------------------------------------------------------------------- random models ---


@dataclass(frozen=True)
class Base:
    """A model as plain data, so that a failing example can be read: a family, or the layers of a sequence."""

    family: str | None
    tied: bool
    layers: tuple[tuple[str, int, bool], ...]  # kind, width of the output, whether it has a bias
    dtype: torch.dtype
    seed: int

    def build(self) -> nn.Module:
        """A fresh copy."""
        return copy.deepcopy(_built(self))

    def inputs(self) -> torch.Tensor:
        if self.family is not None or self.layers[0][0] == "embedding":
            return batch(seed=self.seed)
        return spread((3, 5), self.seed).to(self.dtype)


@cache
def _built(base: Base) -> nn.Module:
    if base.family is not None:
        depth = "n_layer" if base.family == "gpt2" else "num_hidden_layers"
        return build(base.family, dtype=base.dtype, tie_word_embeddings=base.tied, **{depth: 1})
    width, modules = 5, []
    for kind, out, bias in base.layers:
        out = width if kind.endswith("norm") else out
        modules.append(_LAYERS[kind](width, out, bias))
        width = out
    model, generator = nn.Sequential(*modules), torch.Generator().manual_seed(base.seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.to(base.dtype).eval()


_LAYERS = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "conv1d": lambda i, o, bias: Conv1D(o, i),
    "layer norm": lambda i, o, bias: nn.LayerNorm(i, bias=bias),
    "rms norm": lambda i, o, bias: nn.RMSNorm(i, eps=1e-6),
    "embedding": lambda i, o, bias: nn.Embedding(VOCABULARY, o, padding_idx=3 if bias else None),
}


def spread(shape, seed):
    """Random inputs that differ along the last axis, so that no norm divides by nearly nothing."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3 + torch.linspace(-1, 1, shape[-1])


@dataclass(frozen=True)
class Part:
    """An adapter as plain data: a share of the channels, the size of its deltas, a seed for both, what trains."""

    density: float
    size: float
    seed: int
    trainable: str = "deltas"
    offload: bool = False

    def mask(self, model: nn.Module) -> ChannelMask:
        generator = torch.Generator().manual_seed(self.seed)
        counts = candidates(model)
        chosen = {
            n: (torch.rand(c, generator=generator) < self.density).nonzero().flatten() for n, c in counts.items()
        }
        if not any(index.numel() for index in chosen.values()):
            name = list(counts)[self.seed % len(counts)]
            chosen[name] = torch.tensor([self.seed % counts[name]])
        return ChannelMask(chosen, counts)


seeds = st.integers(0, 1000)
factors = st.sampled_from([1.0, 0.0, -1.0, 0.5]) | st.floats(-2, 2)
trained = st.sampled_from([("deltas", False), ("scales", False), ("scales", True), ("both", False)])
parts = st.builds(
    lambda trains, **drawn: Part(**drawn, trainable=trains[0], offload=trains[1]),
    trained,
    density=st.sampled_from([0.3, 0.0, 0.7, 1.0]),
    size=st.sampled_from([0.1, 1.0]),
    seed=seeds,
)
adapters = st.lists(parts, min_size=1, max_size=4)
dtypes = st.sampled_from(DTYPES)
layers = st.builds(
    lambda first, rest: tuple(first + rest),
    st.lists(st.tuples(st.just("embedding"), st.integers(1, 6), st.booleans()), max_size=1),
    st.lists(
        st.tuples(st.sampled_from(sorted(set(_LAYERS) - {"embedding"})), st.integers(1, 6), st.booleans()),
        min_size=1,
        max_size=3,
    ),
)
sequences = st.builds(Base, family=st.none(), tied=st.just(False), layers=layers, dtype=dtypes, seed=seeds)
families = st.builds(
    Base,
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    layers=st.just(()),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=seeds,
)


def with_adapter(tuned, base: Base, name: str, part: Part, **options):
    """The model with one adapter more; `tuned` is None before the first."""
    config = ActConfig(
        channels=part.mask(_built(base)),
        trainable=part.trainable,
        offload_deltas=part.offload,
        task_type=None if base.family is None else "CAUSAL_LM",
    )
    if tuned is None:
        tuned = get_peft_model(base.build(), config, adapter_name=name, **options).eval()
    else:
        tuned.add_adapter(name, config, **options)
    generator = torch.Generator().manual_seed(part.seed)  # the global one is slow to seed
    for layer in layers_of(tuned).values():
        for container in (layer.act_delta_weight, layer.act_delta_bias):
            if name in container:
                delta = container[name].data
                delta.copy_(torch.randn(delta.shape, generator=generator) * part.size)
        if name in layer.act_delta_channel_scale:
            scales = layer.act_delta_channel_scale[name].data
            drawn = torch.rand(scales.shape, generator=generator) * 3 - 1
            scales.copy_(drawn.clamp(min=0))  # a third of them exactly zero
    return tuned


def tune(base: Base, chosen: list[Part], **options):
    """A model with these adapters under the first of `NAMES`."""
    tuned = None
    for name, part in zip(NAMES, chosen, strict=False):
        tuned = with_adapter(tuned, base, name, part, **options)
    return tuned


def layers_of(tuned):
    return {n: m for n, m in tuned.get_base_model().named_modules() if isinstance(m, ActLayer)}


def raw(tensor):
    """The bits of a tensor, in which NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(BITS[tensor.element_size()])


def output(model, x):
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


# ----------------------------------------------------------------------------------------------------- the oracle ---


class Oracle:
    """What the weights must be: the plain model's plus dense copies of the adapters' deltas, in float64.

    All tensors have the channels first: a weight of Conv1D and of an embedding is transposed.
    """

    def __init__(self, base: Base) -> None:
        self.plain = base.build()
        self.before = state_bytes(self.plain)
        modules = dict(self.plain.named_modules())
        self.kinds = {name: kind_of(modules[name]) for name in candidates(self.plain)}
        self.parameters = {
            (name, part): by_channel(getattr(modules[name], part).detach(), kind, part)
            for name, kind in self.kinds.items()
            for part in ("weight", "bias")
            if getattr(modules[name], part, None) is not None
        }
        self.exact = {key: original.double() for key, original in self.parameters.items()}
        self.deltas: dict[str, dict] = {}  # adapter -> (module, part) -> dense delta, the channels that it changes

    def learn(self, tuned, name: str) -> None:
        """Copy the deltas of an adapter, channel by channel."""
        self.deltas[name] = {}
        for module, layer in layers_of(tuned).items():
            for part, container in (("weight", layer.act_delta_weight), ("bias", layer.act_delta_bias)):
                if name not in container:
                    continue
                dense = torch.zeros_like(self.exact[module, part])
                touched = torch.zeros(len(dense), dtype=torch.bool)
                rows = by_channel(container[name].detach(), layer.kind, part)
                scales = layer.act_delta_channel_scale.get(name)
                for k, channel in enumerate(layer.act_delta_index[name].tolist()):
                    scale = 1.0 if scales is None else scales[k].item()
                    dense[channel], touched[channel] = rows[k].double() * scale, True
                self.deltas[name][module, part] = dense, touched

    def sum(self, key, scales) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The merged parameter, the sum of its terms' sizes, and which channels any adapter has."""
        total, size = self.exact[key].clone(), self.exact[key].abs()
        touched = torch.zeros(len(total), dtype=torch.bool)
        for name, scale in scales.items():
            if key in self.deltas[name]:
                dense, channels = self.deltas[name][key]
                total += scale * dense
                size += (scale * dense).abs()
                touched |= channels
        return total, size, touched

    def check(self, model: nn.Module, scales, *, terms: int | None = None) -> None:
        """Whether the base layers of `model` are the sum within one rounding, and untouched channels the base's."""
        for (module, part), original in self.parameters.items():
            layer = model.get_submodule(module)
            merged = getattr(getattr(layer, "base_layer", layer), part).detach()
            merged = by_channel(merged, self.kinds[module], part)
            total, size, touched = self.sum((module, part), scales)
            assert torch.equal(raw(merged[~touched]), raw(original[~touched])), f"{module}.{part}: unselected"
            error = (merged.double() - total).abs()
            allowed = one_rounding(merged, size, terms=len(scales) if terms is None else terms)
            assert (error <= allowed).all(), f"{module}.{part}: {float((error / allowed).max())} of what is allowed"
        if not scales:
            assert state_bytes(model) == self.before
            assert ties(model) == ties(self.plain)

    def check_outputs(self, tuned, scales, seed: int) -> None:
        """Whether every adapted layer computes what the exact weights would, within the roundings of its dtype.

        A base layer rounds its output, and so do each adapter's change, the product with learned scales, and its
        addition; merging rounds the weight.
        Products and sums inside a layer are in float32 or wider.
        """
        for name, layer in layers_of(tuned).items():
            plain = self.plain.get_submodule(name)
            dtype, terms = plain.weight.dtype, len(scales)
            weight, size, _ = self.sum((name, "weight"), scales)
            bias, bias_size = torch.zeros(()), torch.zeros(())
            if (name, "bias") in self.parameters:
                bias, bias_size, _ = self.sum((name, "bias"), scales)
            lost = 0.0  # by cancellation inside the layer, before anything is rounded to its dtype
            if layer.kind is ChannelKind.EMBEDDING:
                x, width = torch.arange(weight.shape[1]), 1
                exact, magnitude = weight.T, size.T
            elif layer.kind.is_norm:
                x, width = spread((4, len(weight)), seed).to(dtype), len(weight)
                mean = x.double().mean(-1, keepdim=True) * (layer.kind is ChannelKind.LAYER_NORM)
                scale = ((x.double() - mean).square().mean(-1, keepdim=True) + plain.eps).rsqrt()
                inner = (x.double() - mean) * scale
                exact, magnitude = inner * weight + bias, inner.abs() * size + bias_size
                lost = (x.double().abs() + mean.abs()) * scale * size
            else:
                x, width = spread((4, weight.shape[1]), seed).to(dtype), weight.shape[1]
                exact, magnitude = x.double() @ weight.T + bias, x.double().abs() @ size.T + bias_size
            wide = torch.finfo(torch.promote_types(dtype, torch.float32))
            allowed = (2 * terms + 2) * torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).tiny
            allowed = allowed + (2 * width + 3 * terms + 2) * wide.eps * (magnitude + lost)
            error = (output(layer, x).double() - exact).abs()
            assert (error <= allowed).all(), f"{name}: {float((error / allowed).max())} of what is allowed"

    def merged(self, scales) -> nn.Module:
        """The plain model with the sum as its weights, rounded once."""
        model = copy.deepcopy(self.plain)
        for module, part in self.parameters:
            plain = model.get_submodule(module)
            total = by_channel(self.sum((module, part), scales)[0], self.kinds[module], part)
            setattr(plain, part, nn.Parameter(total.to(getattr(plain, part).dtype)))
        return model


def ties(model):
    """The names of parameters that share their memory, without the adapters' own."""
    places = {}
    for name, tensor in model.state_dict().items():
        if "act_delta_" not in name:
            places.setdefault(tensor.data_ptr(), set()).add(name.replace(".base_layer.", "."))
    return [names for names in places.values() if len(names) > 1]


def by_channel(tensor, kind, part):
    return tensor.movedim(kind.channel_dim, 0) if part == "weight" else tensor


def one_rounding(merged, size, *, terms):
    """How far a sum may be from the exact one: half a unit in its last place for the rounding to its own dtype, and
    for each term four roundings (learned scale, factor, product, sum) in the dtype in which it is added, which is
    float32 or wider.
    """
    up = torch.nextafter(merged.abs(), torch.full_like(merged, float("inf")))
    wide = torch.promote_types(merged.dtype, torch.float32)
    unit = torch.finfo(wide).eps / 2 + torch.finfo(torch.float64).eps / 2  # the library's and the oracle's own
    return (up.double() - merged.abs().double()) / 2 + 4 * terms * unit * size + torch.finfo(wide).tiny
