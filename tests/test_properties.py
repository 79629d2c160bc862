"""Properties that hold for any model, masks, adapters and order of operations (hypothesis, derandomised).

The oracle (`random_models.Oracle`) adds in float64 on copies that the library never sees. Every property also runs
with ten times as many examples: `pytest -m slow tests/test_properties.py`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import ActConfig, ChannelMask, ChannelScores, combine, create_adapter, merge_checkpoint, prune_channels
from tests.support.random_models import (
    BITS,
    NAMES,
    Base,
    Oracle,
    Part,
    adapters,
    factors,
    families,
    holds,
    layers_of,
    output,
    parts,
    raw,
    seeds,
    sequences,
    tune,
    with_adapter,
)
from tests.support.tiny_checkpoints import SHARD_SIZE
from tests.support.tiny_models import state_bytes

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (  # what PEFT says of things that are meant here
        "Already following adapters were merged",
        "All adapters are already merged",
        "Already unmerged",
        "Adapter cannot be set when the model is merged",
        "Adapter . was active which is now deleted",
        "Model with `tie_word_embeddings=True`",
        "Input and output embeddings are no longer tied",
    )
]


# --------------------------------------------------------------------------------------------- merging, unmerging ---

which = st.integers(1, 15)  # a set of adapters, one bit each
operations = st.one_of(
    st.tuples(st.just("merge"), which, st.booleans()),
    st.tuples(st.just("scale"), st.integers(0, 3), factors),
    st.tuples(st.just("unmerge")),
    st.tuples(st.just("merge active"), st.booleans()),
    st.tuples(st.just("disable"), st.booleans()),
    st.tuples(st.just("activate"), which),
    st.tuples(st.just("delete"), st.integers(0, 3)),
    st.tuples(st.just("add"), parts),
    st.tuples(st.just("prune"), st.integers(0, 3)),
    st.tuples(st.just("combine"), st.lists(factors, min_size=4, max_size=4)),
)


class Walk:
    """A model and what it must be after every step."""

    def __init__(self, base: Base, chosen: list[Part]) -> None:
        self.base, self.tuned, self.oracle = base, tune(base, chosen), Oracle(base)
        self.scales = dict.fromkeys(NAMES[: len(chosen)], 1.0)
        self.active, self.merged = [NAMES[0]], []
        for name in self.scales:
            self.oracle.learn(self.tuned, name)

    def some(self, bits: int) -> list[str]:
        names = list(self.scales)
        return [name for k, name in enumerate(names) if bits >> k & 1] or names[:1]

    def step(self, operation: str, *arguments) -> None:
        getattr(self, operation.replace(" ", "_"))(*arguments)
        self.oracle.check(self.tuned.get_base_model(), {name: self.scales[name] for name in self.merged})

    def merge(self, bits, safe):
        self.tuned.merge_adapter(self.some(bits), safe_merge=safe)
        self.merged += [name for name in self.some(bits) if name not in self.merged]

    def merge_active(self, safe):
        self.tuned.merge_adapter(safe_merge=safe)
        self.merged += [name for name in self.active if name not in self.merged]

    def unmerge(self):
        self.tuned.unmerge_adapter()
        self.merged = []

    def scale(self, number, factor):
        name = list(self.scales)[number % len(self.scales)]
        self.tuned.set_scale(name, factor)
        self.scales[name] = factor

    def disable(self, run):
        with self.tuned.disable_adapter():
            if run:  # PEFT unmerges when a disabled layer runs, not before
                x = self.base.inputs()
                assert torch.equal(raw(output(self.tuned, x)), raw(output(self.oracle.plain, x)))
                self.merged = []

    def activate(self, bits):
        self.active, self.merged = self.some(bits), []
        self.tuned.set_adapter(self.active[0])
        self.tuned.base_model.set_adapter(self.active)

    def delete(self, number):
        name = list(self.scales)[number % len(self.scales)]
        # PEFT refuses a merged adapter. It knows two lists of active ones, and where the first or only one goes, they
        # no longer agree: with LoRA too, the model cannot run before the next `set_adapter`.
        if name in self.merged or name == self.active[0]:
            return
        self.tuned.delete_adapter(name)
        self.active = [active for active in self.active if active != name]
        del self.scales[name]

    def add(self, part):
        name = next(name for name in (*NAMES, "v", "u", *map(str, range(99))) if name not in self.scales)
        with_adapter(self.tuned, self.base, name, part)
        self.grown(name)

    def prune(self, number):
        name = list(self.scales)[number % len(self.scales)]
        layers = [layer for layer in layers_of(self.tuned).values() if name in layer.act_delta_index]
        learned = [layer.act_delta_channel_scale[name] for layer in layers if name in layer.act_delta_channel_scale]
        if name in self.merged or not any(bool(scales.any()) for scales in learned):
            return  # refused
        prune_channels(self.tuned, adapter_name=name)
        assert not any(name in layer.act_delta_channel_scale for layer in layers_of(self.tuned).values())
        self.oracle.learn(self.tuned, name)  # folding rounds the product once

    def combine(self, weights):
        names = list(self.scales)[: len(weights)]
        name = f"new{len(self.oracle.deltas)}"
        self.tuned.base_model.add_weighted_adapter(names, weights[: len(names)], name)
        self.grown(name)

    def grown(self, name):
        self.oracle.learn(self.tuned, name)
        self.scales[name], self.merged = 1.0, []


def any_walk(base, chosen, steps):
    walk = Walk(base, chosen)
    walk.step("disable", True)
    for operation in steps:
        walk.step(*operation)
    for name in walk.scales:
        learned = walk.oracle.deltas[name]
        walk.oracle.learn(walk.tuned, name)
        assert all(torch.equal(dense, learned[key][0]) for key, (dense, _) in walk.oracle.deltas[name].items())
    if walk.merged:
        merged, last = walk.merged, state_bytes(walk.tuned.get_base_model())
        walk.step("unmerge")
        walk.tuned.merge_adapter(merged[::-1])
        assert state_bytes(walk.tuned.get_base_model()) == last  # whatever the way there was
        walk.step("unmerge")
    walk.oracle.check(walk.tuned.unload(), {})


@holds(50, base=sequences, chosen=adapters, steps=st.lists(operations, min_size=2, max_size=10))
def test_whatever_is_merged_when_the_weights_are_the_sum_and_the_way_back_is_exact(base, chosen, steps):
    any_walk(base, chosen, steps)


@holds(8, base=families, chosen=adapters, steps=st.lists(operations, min_size=2, max_size=8))
def test_it_is_so_in_language_models_tied_or_not(base, chosen, steps):
    any_walk(base, chosen, steps)


@holds(20, base=sequences, chosen=adapters, bits=seeds, first=which, second=which)
def test_a_base_of_any_bytes_comes_back(base, chosen, bits, first, second):
    """NaN with any payload, infinities, negative zeros and denormal numbers among them."""
    tuned, generator = tune(base, chosen), torch.Generator().manual_seed(bits)
    for name, parameter in tuned.get_base_model().named_parameters():
        if "act_delta_" not in name:
            kind = BITS[parameter.element_size()]
            limits = torch.iinfo(kind)
            random = torch.randint(limits.min, limits.max, parameter.shape, dtype=kind, generator=generator)
            parameter.data = random.view(base.dtype)
    layers, before = layers_of(tuned), state_bytes(tuned.get_base_model())
    rows = {name: raw(channels_first(layer)).clone() for name, layer in layers.items()}
    for chosen_bits in (first, second):
        tuned.merge_adapter([name for k, name in enumerate(NAMES[: len(chosen)]) if chosen_bits >> k & 1] or ["z"])
        for name, layer in layers.items():
            untouched = torch.ones(layer.num_channels, dtype=torch.bool)
            for adapter in layer.merged_adapters:
                untouched[layer.act_delta_index[adapter]] = False
            assert torch.equal(raw(channels_first(layer))[untouched], rows[name][untouched])
    tuned.unmerge_adapter()
    assert state_bytes(tuned.get_base_model()) == before


def channels_first(layer):
    return layer.get_base_layer().weight.detach().movedim(layer.kind.channel_dim, 0)


# -------------------------------------------------------------------------------------------------------- outputs ---

four_factors = st.lists(factors, min_size=4, max_size=4)


@holds(30, base=sequences, chosen=adapters, weights=four_factors, seed=seeds)
def test_stacked_merged_and_combined_adapters_compute_the_same(base, chosen, weights, seed):
    tuned, oracle = tune(base, chosen), Oracle(base)
    names = list(NAMES[: len(chosen)])
    before = dict(zip(names, [1.0, 0.5, -2.0, 1.0], strict=False))
    for name, scale in before.items():
        oracle.learn(tuned, name)
        tuned.set_scale(name, scale)
    tuned.base_model.add_weighted_adapter(names, weights[: len(names)], "new")
    scales = {name: before[name] * weight for name, weight in zip(names, weights, strict=False)}
    tuned.base_model.set_adapter("new")
    oracle.check_outputs(tuned, scales, seed)
    tuned.merge_adapter()
    # The weighted deltas of the new adapter are rounded too.
    oracle.check(tuned.get_base_model(), scales, terms=2 * len(names) + 1)
    oracle.check_outputs(tuned, scales, seed)
    tuned.base_model.set_adapter(names)
    for name, scale in scales.items():
        tuned.set_scale(name, scale)
    oracle.check_outputs(tuned, scales, seed)
    tuned.merge_adapter()
    oracle.check(tuned.get_base_model(), scales)
    oracle.check_outputs(tuned, scales, seed)


SAME_LOGITS = 1e-3  # of the largest one, in float32: a whole decoder layer amplifies the roundings


@holds(5, base=families, chosen=adapters, weights=four_factors)
def test_a_language_model_with_stacked_adapters_answers_as_one_with_merged_weights(base, chosen, weights):
    base = replace(base, dtype=torch.float32)
    tuned, oracle = tune(base, chosen), Oracle(base)
    scales = dict(zip(NAMES[: len(chosen)], weights, strict=False))
    for name, scale in scales.items():
        oracle.learn(tuned, name)
        tuned.set_scale(name, scale)
    tuned.base_model.set_adapter(list(scales))
    expected = output(oracle.merged(scales), base.inputs())
    close = {"rtol": 0, "atol": SAME_LOGITS * float(expected.abs().max())}
    torch.testing.assert_close(output(tuned, base.inputs()), expected, **close)
    tuned.merge_adapter()
    torch.testing.assert_close(output(tuned, base.inputs()), expected, **close)


# --------------------------------------------------------------------------------------------------- files, disk ---

COMBINATIONS = {
    **{name: {} for name in ("linear", "sum", "mean", "first", "larger")},
    **{name: {"density": 0.6} for name in ("dare_linear", "dare_ties", "magnitude_prune")},
    "ties": {"density": 0.4, "majority_sign_method": "frequency"},
}
combinations = st.sampled_from(sorted(COMBINATIONS))


@holds(15, base=sequences, chosen=adapters, weights=four_factors, combination_type=combinations, upcast=st.booleans())
def test_adapters_combined_on_disk_are_those_combined_in_memory(base, chosen, weights, combination_type, upcast):
    tuned, names = tune(base, chosen, autocast_adapter_dtype=upcast), list(NAMES[: len(chosen)])
    how = {"combination_type": combination_type, **COMBINATIONS[combination_type]}
    weights = weights[: len(names)]
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        torch.manual_seed(base.seed)
        combine({name: f"{folder}/{name}" for name in names}, f"{folder}/disk", weights=weights, **how)
        torch.manual_seed(base.seed)
        tuned.base_model.add_weighted_adapter(names, weights, "memory", **how)
        tuned.save_pretrained(folder, selected_adapters=["memory"])
        disk, memory = (Path(folder, name, "adapter_model.safetensors") for name in ("disk", "memory"))
        assert disk.read_bytes() == memory.read_bytes()


@holds(12, base=sequences, chosen=adapters, merged=st.integers(0, 15), scale=factors, upcast=st.booleans())
def test_saved_adapters_load_bit_for_bit(base, chosen, merged, scale, upcast):
    tuned, names = tune(base, chosen, autocast_adapter_dtype=upcast), NAMES[: len(chosen)]
    tuned.set_scale("z", scale)  # neither a factor nor a merge is part of what is saved
    some = [name for k, name in enumerate(names) if merged >> k & 1]
    tuned.merge_adapter(some)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(f"{folder}/first")
        loaded = None
        for name in names[::-1]:
            place = f"{folder}/first/{name}"
            options = {"adapter_name": name, "autocast_adapter_dtype": upcast}
            if loaded is None:
                loaded = PeftModel.from_pretrained(base.build(), place, **options)
            else:
                loaded.load_adapter(place, **options)
        loaded.save_pretrained(f"{folder}/second")
        for name in names:
            files = [Path(folder, which, name, "adapter_model.safetensors") for which in ("first", "second")]
            assert files[0].read_bytes() == files[1].read_bytes()
            assert tuned.peft_config[name].adapted_modules == loaded.peft_config[name].adapted_modules
    for module, layer in layers_of(loaded).items():
        other = layers_of(tuned)[module]
        for container in ("act_delta_weight", "act_delta_bias", "act_delta_channel_scale", "act_delta_index"):
            left, right = dict(getattr(layer, container)), dict(getattr(other, container))
            assert left.keys() == right.keys()
            assert all(t.dtype == right[n].dtype and torch.equal(raw(t), raw(right[n])) for n, t in left.items())


@holds(6, base=families, chosen=adapters, weights=four_factors)
def test_checkpoints_merge_on_disk_as_models_in_memory(base, chosen, weights):
    tuned, plain = tune(base, chosen), base.build()
    scales = dict(zip(NAMES[: len(chosen)], weights, strict=False))
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(f"{folder}/base", max_shard_size=SHARD_SIZE)
        tuned.save_pretrained(f"{folder}/adapters")
        places = {name: f"{folder}/adapters/{name}" for name in scales}
        merge_checkpoint(f"{folder}/base", places, f"{folder}/out", weights=scales)
        on_disk = AutoModelForCausalLM.from_pretrained(f"{folder}/out")
        for name, scale in scales.items():
            tuned.set_scale(name, scale)
        assert state_bytes(on_disk) == state_bytes(tuned.merge_and_unload(adapter_names=list(scales)))


@holds(6, base=families, part=parts, transfer_scale=factors)
def test_adapters_are_created_on_disk_as_in_memory(base, part, transfer_scale):
    plain, donor = base.build(), base.build()
    generator = torch.Generator().manual_seed(base.seed)
    for parameter in donor.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.02).to(base.dtype)
    mask = part.mask(plain)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("base", plain), ("donor", donor)):
            model.save_pretrained(f"{folder}/{name}", max_shard_size=SHARD_SIZE)
        settings = {"donor": f"{folder}/donor", "transfer_scale": transfer_scale, "task_type": "CAUSAL_LM"}
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        get_peft_model(model, ActConfig(channels=mask, **settings)).save_pretrained(f"{folder}/memory")
        create_adapter(f"{folder}/base", f"{folder}/donor", mask, f"{folder}/disk", transfer_scale=transfer_scale)
        disk, memory = ({p.name: p.read_bytes() for p in Path(folder, n).iterdir()} for n in ("disk", "memory"))
        assert disk == memory


# ----------------------------------------------------------------------------------------------- masks and scores ---

COUNTS = {"a": 5, "b": 1, "c.a": 9, "d": 3}
channel_sets = st.fixed_dictionaries(
    {}, optional={name: st.sets(st.integers(0, count - 1)) for name, count in COUNTS.items()}
)


def mask_of(sets):
    return ChannelMask({name: list(channels)[::-1] for name, channels in sets.items()}, {n: COUNTS[n] for n in sets})


@holds(60, left=channel_sets, right=channel_sets)
def test_masks_are_sets_of_channels(left, right):
    def pairs(mask):
        return {(name, int(channel)) for name in mask for channel in mask[name]}

    a, b = mask_of(left), mask_of(right)
    sets = {(n, c) for n in left for c in left[n]}, {(n, c) for n in right for c in right[n]}
    assert (pairs(a), pairs(b)) == sets
    for result, expected in ((a | b, sets[0] | sets[1]), (a & b, sets[0] & sets[1]), (a - b, sets[0] - sets[1])):
        assert pairs(result) == expected
        assert result.num_selected == len(expected)
        assert set(result) == set(left) | set(right)
        assert all(result[name].tolist() == sorted(result[name].tolist()) for name in result)
        assert result.density == len(expected) / max(sum(COUNTS[name] for name in {**left, **right}), 1)
    union = sets[0] | sets[1]
    assert a.jaccard(b) == (len(sets[0] & sets[1]) / len(union) if union else 1.0)
    assert (a == b) == (left == right)
    assert (a - b) | (a & b) == a | (b & mask_of({name: set() for name in right}))
    with tempfile.TemporaryDirectory() as folder:
        a.save(f"{folder}/mask")
        assert ChannelMask.load(f"{folder}/mask") == a


values = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 1e6)  # with many equal ones
score_lists = st.lists(st.lists(values, min_size=1, max_size=7), min_size=1, max_size=4)


@holds(60, lists=score_lists, density=st.floats(0, 1), tokens=st.integers(1, 9), comparable=st.integers(1, 7))
def test_the_top_channels_are_those_of_a_plain_sort(lists, density, tokens, comparable):
    counts = {f"m{k}": min(len(scores), comparable) for k, scores in enumerate(lists)}
    rows = {f"m{k}": [s if c < comparable else 0.0 for c, s in enumerate(row)] for k, row in enumerate(lists)}
    sums = {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}
    scores = ChannelScores(sums, tokens, num_comparable=counts)
    ranked = [(-row[c] / tokens, k, c) for k, row in enumerate(rows.values()) for c in range(counts[f"m{k}"])]
    assert chosen_by(scores.top(density)) == {(f"m{k}", c) for _, k, c in top_of(ranked, density)}
    for normalize in ("none", "rms"):
        each = [r for k in range(len(rows)) for r in top_of([one for one in ranked if one[1] == k], density)]
        assert chosen_by(scores.top(density, scope="module", normalize=normalize)) == {
            (f"m{k}", c) for _, k, c in each
        }
    assert scores + scores == ChannelScores({n: 2 * s for n, s in sums.items()}, 2 * tokens, num_comparable=counts)


def top_of(ranked, density):
    return sorted(ranked)[: round(density * len(ranked))]


def chosen_by(mask):
    return {(name, channel) for name in mask for channel in mask[name].tolist()}
