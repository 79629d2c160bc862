"""torch.compile, torch.export, gradient checkpointing, autocast, inference mode and copies of adapted models."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters

from act_peft import ActConfig, initialize_from_donor
from tests.support.tiny_models import batch, build, build_relatives, random_mask

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # older name


def adapted(*, dtype=torch.float32, scale=0.1, **settings):
    model = build("llama", dtype=dtype, num_hidden_layers=1)
    masks = [random_mask(model, 0.3, seed=seed) for seed in range(2)]
    tuned = get_peft_model(model, ActConfig(channels=masks[0], init_weights=False, task_type="CAUSAL_LM"), **settings)
    tuned.add_adapter("second", ActConfig(channels=masks[1], init_weights=False, task_type="CAUSAL_LM"), **settings)
    for parameter in (p for n, p in tuned.named_parameters() if "act_delta_" in n):
        parameter.data *= scale
    return tuned.eval()


def gradients(tuned):
    return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}


def step(function, tuned, ids):
    tuned.zero_grad(set_to_none=True)
    function(input_ids=ids, labels=ids).loss.backward()
    return gradients(tuned)


# ------------------------------------------------------------------------------------------------- torch.compile ---


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def compiled(tuned):
    """One graph or an error; what is compiled is then run as it is."""
    return torch.compile(tuned, backend="aot_eager", fullgraph=True)


@pytest.mark.slow  # a minute each
def test_a_compiled_forward_is_one_graph_that_is_kept():
    tuned = adapted()
    run = compiled(tuned)
    with torch.no_grad():
        for seed in range(3):
            ids = batch(seed=seed)
            torch.testing.assert_close(run(input_ids=ids).logits, tuned(input_ids=ids).logits)
        assert graphs() == 1
        for scale in (0.5, 0.25, -1.0):  # the first change of a number compiles once more, with the number as an input
            tuned.set_scale("default", scale)
            torch.testing.assert_close(run(input_ids=batch()).logits, tuned(input_ids=batch()).logits)
        assert graphs() <= 2
        tuned.base_model.set_adapter(["default", "second"])
        for seed in range(2):
            ids = batch(seed=seed)
            torch.testing.assert_close(run(input_ids=ids).logits, tuned(input_ids=ids).logits)
        assert graphs() <= 3


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_training_step_is_one_graph_that_is_kept(autocast):
    tuned = adapted().train()
    run = compiled(tuned)
    for seed in range(3):
        ids = batch(seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, found = step(tuned, tuned, ids), step(run, tuned, ids)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-2 if autocast else 1e-4, atol=1e-4)
    assert graphs() == 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_one_compiled_layer_is_one_graph(mode):
    """The quick form of the two above."""
    tuned = getattr(adapted(), mode)()
    layer = tuned.get_base_model().model.layers[0].mlp.up_proj
    run = compiled(layer)
    for seed in range(3):
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(run(x), layer(x))
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
def test_a_compiled_layer_with_offloaded_deltas_is_one_graph():
    base, donor = build_relatives("llama")
    config = ActConfig(channels=random_mask(base, 0.3), trainable="scales", offload_deltas=True)
    tuned = get_peft_model(base, config)
    initialize_from_donor(tuned, donor)
    layer = tuned.get_base_model().model.layers[0].mlp.up_proj
    scales, run = layer.act_delta_channel_scale["default"], compiled(layer)
    for seed in range(3):
        x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        expected = torch.autograd.grad(layer(x).square().sum(), (x, scales))
        torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), (x, scales)), expected)
    assert graphs() == 1


def test_a_merged_model_is_exported():
    tuned = adapted()
    expected = tuned(input_ids=batch(), use_cache=False).logits
    merged = tuned.merge_and_unload().eval()
    program = torch.export.export(merged, (), {"input_ids": batch(), "use_cache": False})
    torch.testing.assert_close(
        program.module()(input_ids=batch(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
    )


# -------------------------------------------------------------------------------------------------------- training ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    tuned = adapted().train()
    expected = step(tuned, tuned, batch())
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned.enable_input_require_grads()  # without it nothing before the first reentrant block would get a gradient
    found = step(tuned, tuned, batch())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_inputs_that_require_gradients_change_nothing():
    """PEFT makes the output of the embedding a leaf, which must not be written to."""
    tuned = adapted().train()
    expected = step(tuned, tuned, batch())
    tuned.enable_input_require_grads()
    found = step(tuned, tuned, batch())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["float32 deltas", "deltas of the base's dtype"])
def test_every_dtype_trains_runs_and_merges(dtype, wide):
    tuned = adapted(dtype=dtype, autocast_adapter_dtype=wide)
    assert {p.dtype for n, p in tuned.named_parameters() if "act_delta_" in n} == {torch.float32 if wide else dtype}
    ids = batch()
    exact = copy.deepcopy(tuned).double()(input_ids=ids).logits
    logits = tuned(input_ids=ids).logits
    assert logits.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (logits.double() - exact).abs().max() <= tolerance * exact.abs().max()
    found = step(tuned.train(), tuned, ids)
    assert found
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in found.values())
    merged = tuned.eval().merge_and_unload()(input_ids=ids).logits
    assert (merged.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_autocast_computes_in_half_precision_and_keeps_the_deltas_wide():
    tuned = adapted().train()
    expected = step(tuned, tuned, batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert tuned(input_ids=batch()).logits.dtype == torch.bfloat16
        found = step(tuned, tuned, batch())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 0.1 * expected[name].norm(), name


# ------------------------------------------------------------------------------------------------------ inference ---


def test_inference_mode_merges_and_adds():
    tuned = adapted()
    expected = tuned(input_ids=batch()).logits.detach()
    with torch.inference_mode():
        assert torch.equal(tuned(input_ids=batch()).logits, expected)
        tuned.merge_adapter()
        torch.testing.assert_close(tuned(input_ids=batch()).logits, expected, rtol=1e-4, atol=1e-4)
        tuned.unmerge_adapter()
    assert torch.equal(tuned(input_ids=batch()).logits, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_independent(merged):
    tuned = adapted()
    plain = tuned(input_ids=batch()).logits.detach()
    if merged:
        tuned.merge_adapter()
    twin = copy.deepcopy(tuned)
    expected = tuned(input_ids=batch()).logits.detach()
    for layer in twin.modules():
        for parameter in layer.parameters(recurse=False):
            parameter.data *= 2
    assert torch.equal(tuned(input_ids=batch()).logits, expected)
    if merged:
        tuned.unmerge_adapter()
    assert torch.equal(tuned(input_ids=batch()).logits, plain)
