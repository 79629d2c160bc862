"""Mixed batches: every sample gets what its own adapter alone would give it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from act_peft import ActConfig, ActTypeError, ActValueError
from act_peft.layers import ActLayer
from tests.support.tiny_models import COMMON, batch, build, random_mask, state_bytes

NAMES = ["second", "__base__", "default", "second", "default"]


def two_adapters(model, **settings):
    first, second = (
        # The input of T5's table of relative positions has no axis of samples; `shared` never runs.
        {
            name: index
            for name, index in random_mask(model, 0.3, seed=seed).items()
            if "relative_attention_bias" not in name and name != "shared"
        }
        for seed in (0, 1)
    )
    tuned = get_peft_model(model, ActConfig(channels=first, init_weights=False, task_type="CAUSAL_LM", **settings))
    # The output layer is left out: an adapter may lack modules that another one has.
    second.pop("lm_head", None)
    tuned.add_adapter("second", ActConfig(channels=second, init_weights=False, task_type="CAUSAL_LM"))
    # Random deltas of size one drown what distinguishes samples.
    for module in tuned.modules():
        if isinstance(module, ActLayer):
            for delta in [*module.act_delta_weight.values(), *module.act_delta_bias.values()]:
                delta.data *= 0.1
    return tuned.eval()


def one_at_a_time(tuned, function, names, rows):
    """What each row gives when its adapter alone is active, for the whole batch of equal rows."""
    results = []
    for name, row in zip(names, rows, strict=True):
        if name == "__base__":
            with tuned.disable_adapter():
                results.append(function(row[None]))
        else:
            tuned.set_adapter(name)
            results.append(function(row[None]))
    tuned.set_adapter("default")
    return results


def test_every_family_gives_each_sample_its_own_adapter(family):
    tuned, ids = two_adapters(build(family)), batch(rows=len(NAMES))
    expected = torch.cat(one_at_a_time(tuned, lambda x: tuned(input_ids=x).logits, NAMES, ids))
    result = tuned(input_ids=ids, adapter_names=NAMES).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for i, name in enumerate(NAMES):
        others = [j for j, other in enumerate(NAMES) if other != name]
        swapped = tuned(input_ids=ids[i : i + 1].expand(len(NAMES), -1), adapter_names=NAMES).logits
        assert all(not torch.allclose(swapped[i], swapped[j], atol=1e-3) for j in others)
    assert not any(module._forward_pre_hooks for module in tuned.modules())


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 2, 6)),
    "conv1d": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 2, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (3, 2))),
    "layer norm": (lambda: nn.LayerNorm(5), lambda: torch.randn(3, 2, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), lambda: torch.randn(3, 2, 5)),
}


class One(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_each_kind_of_layer_by_its_merged_weight(kind, scale):
    torch.manual_seed(0)
    make, make_input = MODULES[kind]
    tuned = get_peft_model(One(make()), ActConfig(channels={"module": [0, 3]}, init_weights=False))
    tuned.add_adapter("b", ActConfig(channels={"module": [1, 2, 3]}, init_weights=False))
    tuned.eval().set_scale("b", scale)
    x, names = make_input(), ["b", "__base__", "default"]
    result = tuned(x, adapter_names=names)
    layer = tuned.base_model.model.module
    for i, name in enumerate(names):
        if name != "__base__":
            tuned.merge_adapter([name])
        torch.testing.assert_close(result[i], layer.base_layer(x)[i])
        if name != "__base__":
            tuned.unmerge_adapter()
    assert torch.equal(result[1], layer.base_layer(x)[1])


def test_gradients_reach_an_input(family):
    """In evaluation mode, as attribution methods use it."""
    tuned, ids = two_adapters(build(family)), batch(rows=2)
    inputs = tuned.get_input_embeddings()(ids).detach().requires_grad_()
    tuned(inputs_embeds=inputs, adapter_names=["default", "second"]).logits.sum().backward()
    assert inputs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0)},
    ],
    ids=["greedy", "beams", "several sequences", "beams of a configuration"],
)
def test_generation(settings):
    tuned, ids = two_adapters(build("llama")), batch(rows=len(NAMES))
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    if "generation_config" in settings:
        settings = {"generation_config": settings["generation_config"]}
    alone = one_at_a_time(tuned, lambda x: tuned.generate(input_ids=x, **settings), NAMES, ids)
    result = tuned.generate(input_ids=ids, adapter_names=NAMES, **settings)
    for i, sequences in enumerate(alone):
        count = len(sequences)
        mine = result[i * count : (i + 1) * count, : sequences.shape[1]]
        assert torch.equal(mine, sequences)
        assert (result[i * count : (i + 1) * count, sequences.shape[1] :] == 0).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder_models(beams):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=COMMON["vocab_size"],
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    tuned = two_adapters(transformers.T5ForConditionalGeneration(config).eval())
    ids = batch(rows=len(NAMES))
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    alone = one_at_a_time(tuned, lambda x: tuned.generate(input_ids=x, **settings), NAMES, ids)
    result = tuned.generate(input_ids=ids, adapter_names=NAMES, **settings)
    for i, sequences in enumerate(alone):
        assert torch.equal(result[i, : sequences.shape[1]], sequences[0])
    starts = torch.zeros(len(NAMES), 1, dtype=torch.int64)
    whole = tuned(input_ids=ids, decoder_input_ids=starts, adapter_names=NAMES).logits
    expected = one_at_a_time(tuned, lambda x: tuned(input_ids=x, decoder_input_ids=starts[:1]).logits, NAMES, ids)
    torch.testing.assert_close(whole, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_whole_modules_and_token_rows_follow_the_samples():
    model = build("llama")
    channels = {"q_proj": [0, 3]}
    whole = {"modules_to_save": ["lm_head"], "trainable_token_indices": [4, 5]}
    tuned = get_peft_model(model, ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM", **whole))
    tuned.add_adapter("second", ActConfig(channels=channels, init_weights=False, **whole))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape))
    tuned.eval()
    ids = batch(rows=len(NAMES))
    ids[:, 2:4] = torch.tensor([4, 5])
    expected = torch.cat(one_at_a_time(tuned, lambda x: tuned(input_ids=x).logits, NAMES, ids))
    result = tuned(input_ids=ids, adapter_names=NAMES).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- refusals ---


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["default"], ActValueError, "Length of `adapter_names` .* got 1 and 2 respectively"),
        (["default"] * 4, ActValueError, "Length of `adapter_names` .* got 4 and 2 respectively"),
        (["default", "third"], ActValueError, r"non-existing adapter\(s\): third .*'default', 'second'.* '__base__'"),
        ("default", ActTypeError, "adapter_names: got 'default', expected a list"),
        ([0, 1], ActTypeError, r"adapter_names: got \[0, 1\], expected a list"),
    ],
)
def test_bad_names_are_refused(names, error, match):
    tuned = two_adapters(build("llama"))
    for call in (tuned, partial(tuned.generate, max_new_tokens=2)):
        with pytest.raises(error, match=match):
            call(input_ids=batch(), adapter_names=names)
    assert not any(module._forward_pre_hooks for module in tuned.modules())


def test_a_layer_whose_input_is_not_one_row_per_sample_is_refused():
    class Flattening(One):
        def forward(self, x):
            return self.module(x.flatten(0, 1))

    tuned = get_peft_model(Flattening(nn.Linear(4, 3)), ActConfig(channels={"module": [0]})).eval()
    with pytest.raises(ActValueError, match=r"got 2 and 6 respectively.*adapted module: Linear\(in_features=4"):
        tuned(torch.randn(2, 3, 4), adapter_names=["default", "__base__"])


def test_training_mode_is_refused():
    tuned = two_adapters(build("llama")).train()
    with pytest.raises(ActValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        tuned(input_ids=batch(), adapter_names=["default", "second"])


def test_merged_adapters_are_refused():
    tuned = two_adapters(build("llama"))
    tuned.merge_adapter(["second"])
    with pytest.raises(ActValueError, match="Cannot pass `adapter_names` when there are merged adapters, please call"):
        tuned(input_ids=batch(), adapter_names=["default", "second"])


def test_disabled_adapters_give_the_base_back_even_where_they_were_merged():
    model = build("llama")
    expected, before = model(batch()).logits, state_bytes(model)
    tuned = two_adapters(model)
    tuned.merge_adapter(["second"])
    with tuned.disable_adapter():
        assert torch.equal(tuned(input_ids=batch(), adapter_names=["default", "second"]).logits, expected)
    assert state_bytes(tuned.get_base_model()) == before


def test_a_loaded_adapter_takes_part(tmp_path):
    tuned = two_adapters(build("llama"))
    expected = tuned(input_ids=batch(), adapter_names=["second", "default"]).logits
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(loaded.eval()(input_ids=batch(), adapter_names=["second", "default"]).logits, expected)
