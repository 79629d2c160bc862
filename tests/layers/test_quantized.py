"""Quantized bases: bitsandbytes with 4 and 8 bit, torchao with int8 weights, on the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from act_peft import (
    ActConfig,
    ActTypeError,
    ActValueError,
    ActWarning,
    create_adapter,
    initialize_from_donor,
    localize,
    merge_checkpoint,
)
from act_peft.channels.kinds import is_quantized
from act_peft.layers import ActLayer
from tests.support.tiny_models import batch, build, random_mask

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # 4 bit wants 32 rows and blocks of 64


def eight_bit():
    pytest.importorskip("bitsandbytes", "0.46")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bit():
    pytest.importorskip("bitsandbytes", "0.46")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def four_bit_nested():
    pytest.importorskip("bitsandbytes", "0.46")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,  # as FSDP wants it: the codes look like floating point numbers
    )


def torchao():
    pytest.importorskip("torchao", "0.16")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTISED = {f.__name__: f for f in (eight_bit, four_bit, four_bit_nested, torchao)}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit in the kernels below bitsandbytes
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from.*to float16 during quantization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    build("qwen2", **SIZES).save_pretrained(path)
    return path


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] if "nested" in n else []) for n in QUANTISED])
def base(request, folder):
    config = QUANTISED[request.param]()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def adapted(base, *, scale=0.05, **settings):
    mask = random_mask(build("qwen2", **SIZES), 0.3)
    tuned = get_peft_model(base, ActConfig(channels=mask, init_weights=False, task_type="CAUSAL_LM"), **settings)
    for parameter in (p for n, p in tuned.named_parameters() if "act_delta_" in n):
        parameter.data *= scale
    return tuned.eval()


def linear_layers(tuned):
    layers = {n: m for n, m in tuned.get_base_model().named_modules() if isinstance(m, ActLayer) and m.is_quantized}
    assert len(layers) == 14  # the linear layers of two decoder layers
    return layers


def stored(module):
    """The bytes of everything that a module's state holds, packed or not."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        parts = (
            {part: getattr(tensor, part) for part in tensor.tensor_data_names}
            if hasattr(tensor, "tensor_data_names")
            else {"": tensor}
        )
        for part, value in parts.items():
            tensors[f"{name}.{part}"] = value.detach().contiguous().clone().view(torch.uint8)
    return tensors


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_unmerged_deltas_are_added_to_what_the_quantized_layer_computes(base):
    tuned = adapted(base)
    for name, layer in linear_layers(tuned).items():
        assert is_quantized(layer.base_layer)
        assert layer.act_delta_weight["default"].dtype == torch.float32
        x = torch.randn(2, 3, layer.in_features)
        expected = layer.base_layer(x).detach().clone()
        delta, index = layer.act_delta_weight["default"].detach(), layer.act_delta_index["default"]
        change = x @ delta.T
        if layer.has_bias:
            change = change + layer.act_delta_bias["default"].detach()
        expected[..., index] += change
        torch.testing.assert_close(layer(x), expected, msg=lambda m, n=name: f"{n}: {m}")


def test_without_training_the_output_is_the_base_s(base):
    expected = base(batch()).logits
    tuned = get_peft_model(base, ActConfig(channels=random_mask(build("qwen2", **SIZES), 0.3))).eval()
    assert torch.equal(tuned(batch()).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_every_delta_and_no_byte_of_the_base(base, checkpointing):
    mask = random_mask(build("qwen2", **SIZES), 0.3)
    settings = {"use_gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        prepared = prepare_model_for_kbit_training(base, **settings)
    tuned = get_peft_model(prepared, ActConfig(channels=mask, task_type="CAUSAL_LM"))
    before = stored(tuned.get_base_model())
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = tuned.train()(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = stored(tuned.get_base_model())
    assert all(torch.equal(after[name], before[name]) for name in before if "act_delta_" not in name)
    assert all(bool((after[n] != before[n]).any()) for n in before if "act_delta_weight" in n)


@torch.no_grad()  # bitsandbytes' CPU kernels cannot run in evaluation mode with gradients
def test_mixed_batches(base):
    tuned = adapted(base)
    together = tuned(input_ids=batch(), adapter_names=["default", "__base__"]).logits
    # Quantized inputs: rounding depends on the batch, so the same batch is used.
    with tuned.disable_adapter():
        torch.testing.assert_close(together[1], tuned(batch()).logits[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(together[0], tuned(batch()).logits[0], rtol=2e-2, atol=2e-2)


def test_an_adapter_of_the_plain_base_loads_without_complaint(base, tmp_path):
    plain = adapted(build("qwen2", **SIZES))
    plain.save_pretrained(tmp_path)
    tuned = PeftModel.from_pretrained(base, tmp_path).eval()  # warnings are errors
    for name, layer in linear_layers(tuned).items():
        mine = plain.get_base_model().get_submodule(name)
        assert torch.equal(layer.act_delta_weight["default"], mine.act_delta_weight["default"])
    assert not torch.allclose(tuned(batch()).logits, base_logits(tuned))


def base_logits(tuned):
    with tuned.disable_adapter():
        return tuned(batch()).logits


def test_an_adapter_made_on_a_quantized_base_is_saved_and_loaded(base, tmp_path):
    tuned = adapted(base)
    tuned.save_pretrained(tmp_path)
    expected = tuned(batch()).logits
    loaded = PeftModel.from_pretrained(tuned.unload(), tmp_path).eval()
    # Saving makes bitsandbytes rearrange its 4 bit weights, which rounds their scales.
    torch.testing.assert_close(loaded(batch()).logits, expected, rtol=0.05, atol=0.05)
    on_plain = PeftModel.from_pretrained(build("qwen2", **SIZES), tmp_path)  # its linear layers have no fingerprint
    assert isinstance(on_plain.get_base_model().model.layers[0].mlp.up_proj, ActLayer)


# -------------------------------------------------------------------------------------------------------- merging ---

MERGING = pytest.mark.filterwarnings("ignore:.*is quantized. merging rounds:act_peft.errors.ActWarning")


def dequantized(layer):
    return layer.original_rows(torch.arange(layer.num_channels)).weight


@MERGING
@pytest.mark.parametrize("forward_first", [False, True])
def test_merging_quantizes_the_sum_and_unmerging_gives_the_codes_back(base, forward_first):
    tuned = adapted(base)
    if forward_first:
        tuned(batch())  # bitsandbytes rearranges its weights when it runs
    before = {n: stored(m.base_layer) for n, m in linear_layers(tuned).items()}
    dense = {n: dequantized(m) for n, m in linear_layers(tuned).items()}
    expected = tuned(batch()).logits
    tuned.merge_adapter()
    for name, layer in linear_layers(tuned).items():
        merged = copy.deepcopy(layer)
        merged._rows = type(merged._rows)()  # forgets that anything was merged: reads what is stored now
        index = layer.act_delta_index["default"]
        now, wanted = dequantized(merged), dense[name].clone()
        wanted[index] += layer.act_delta_weight["default"].detach().to(wanted)
        step = wanted.abs().amax() / (127 if "4" not in type(layer.base_layer).__name__ else 4)
        assert (now - wanted).abs().max() <= step, name
        untouched = torch.ones(layer.num_channels, dtype=torch.bool)
        untouched[index] = False
        torch.testing.assert_close(now[untouched], dense[name][untouched], rtol=1e-2, atol=1e-2)
    close = (tuned(batch()).logits - expected).abs().mean() / expected.abs().mean()
    assert close < 0.5
    tuned.unmerge_adapter()
    for name, layer in linear_layers(tuned).items():
        assert same(stored(layer.base_layer), before[name]), name
    if forward_first:
        assert torch.equal(tuned(batch()).logits, expected)


@MERGING
@pytest.mark.parametrize("kind", ["four_bit", "four_bit_nested", "eight_bit"])
def test_a_base_that_has_run_is_merged_as_what_it_computes_with(kind, tmp_path):
    sizes = {**SIZES, "hidden_size": 128}  # two blocks a row
    plain = build("qwen2", **sizes)
    plain.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTISED[kind](), device_map="cpu")
    tuned = get_peft_model(base.eval(), ActConfig(channels=random_mask(plain, 0.3), init_weights=False))
    for parameter in (p for n, p in tuned.named_parameters() if "act_delta_" in n):
        parameter.data *= 0.05
    with torch.no_grad():
        expected = tuned(batch()).logits
        for name, layer in linear_layers(tuned).items():
            weight = plain.get_submodule(name).weight
            lost = (dequantized(layer) - weight).abs().mean() / weight.abs().mean()
            assert lost < 0.2, name  # 4 bits; scrambled blocks are off by more than half
        tuned.merge_adapter()
        merged = tuned(batch()).logits
        tuned.unmerge_adapter()
        assert torch.equal(tuned(batch()).logits, expected)
    assert (merged - expected).abs().mean() / expected.abs().mean() < 0.5


@MERGING
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_merging_one_after_the_other_and_scaling_rounds_once(base):
    tuned = adapted(base)
    tuned.add_adapter("second", ActConfig(channels={"up_proj": [0, 1, 2]}, init_weights=False))
    layer = tuned.get_base_model().model.layers[0].mlp.up_proj
    before = stored(layer.base_layer)
    both = copy.deepcopy(tuned)
    both.base_model.set_adapter(["default", "second"])
    both.set_scale("second", 0.5)
    both.merge_adapter()
    tuned.merge_adapter(["second"])
    tuned.merge_adapter(["default"])
    tuned.set_scale("second", 0.5)
    assert same(stored(layer.base_layer), stored(both.get_base_model().model.layers[0].mlp.up_proj.base_layer))
    tuned.unmerge_adapter()
    assert same(stored(layer.base_layer), before)


@MERGING
def test_merge_and_unload_gives_a_quantized_model_without_adapters(base):
    tuned = adapted(base)
    expected = copy.deepcopy(tuned)
    expected.merge_adapter()
    merged = tuned.merge_and_unload()
    assert not any(isinstance(module, ActLayer) for module in merged.modules())
    assert is_quantized(merged.model.layers[0].mlp.up_proj)
    assert torch.equal(merged.eval()(batch()).logits, expected.eval()(batch()).logits)


def test_merging_into_codes_warns_once():
    pytest.importorskip("bitsandbytes", "0.46")
    import bitsandbytes

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = bitsandbytes.nn.Linear8bitLt(8, 4, has_fp16_weights=False)

        def forward(self, x):
            return self.module(x)

    tuned = get_peft_model(One().to("cpu"), ActConfig(channels={"module": [0]}))
    with pytest.warns(ActWarning, match="Linear8bitLt: its weight is quantized, merging rounds .* merge_checkpoint"):
        tuned.merge_adapter()


class Unknown(nn.Linear):
    """A layer with codes that nothing here can read, as 8 bit floating point weights are."""

    def __init__(self):
        super().__init__(4, 3)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_weights_in_a_form_that_is_not_known_are_adapted_but_not_merged():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Unknown()

        def forward(self, x):
            return self.module(x)

    tuned = get_peft_model(One(), ActConfig(channels={"module": [0, 2]}, init_weights=False)).eval()
    x = torch.randn(2, 4)
    expected = tuned(x)
    with pytest.raises(
        ActTypeError, match=r"Unknown: its weight is a Parameter \(torch.float8_e4m3fn\).*merge_checkpoint"
    ):
        tuned.merge_adapter()
    assert torch.equal(tuned(x), expected)
    assert not tuned.base_model.model.module.merged


def test_torchao_weights_with_other_scales_are_not_merged():
    quantization = pytest.importorskip("torchao.quantization")
    module = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(module, quantization.Int8DynamicActivationInt8WeightConfig())
    tuned = get_peft_model(module, ActConfig(channels={"0": [1]}, init_weights=False)).eval()
    with pytest.raises(ActTypeError, match=r"Linear: its weight is a Int8Tensor .*keep the adapter unmerged"):
        tuned.merge_adapter()


# --------------------------------------------------------------------------------------------------------- donors ---


def test_donors_are_refused_and_the_way_round_works(base, tmp_path):
    mask = random_mask(build("qwen2", **SIZES), 0.3)
    other = build("qwen2", seed=0, **SIZES)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    other.save_pretrained(tmp_path / "donor")
    match = "is quantized, expected the base's original values.*14 of 21 modules.*create_adapter"
    with pytest.raises(ActValueError, match=match):
        get_peft_model(base, ActConfig(channels=mask, donor=str(tmp_path / "donor")))
    assert not any(isinstance(module, ActLayer) for module in base.modules())
    build("qwen2", **SIZES).save_pretrained(tmp_path / "base")
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "adapter", transfer_scale=0.4)
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not torch.allclose(tuned(batch()).logits, base_logits(tuned))
    with pytest.raises(ActValueError, match="is quantized, expected the base's original values"):
        initialize_from_donor(tuned, other)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    reference = PeftModel.from_pretrained(build("qwen2", **SIZES), tmp_path / "adapter").eval()
    torch.testing.assert_close(whole(batch()).logits, reference(batch()).logits, rtol=1e-3, atol=1e-3)


def test_channels_of_quantized_models_are_localized(base):
    """The scores of a quantized pair; only outputs are compared."""
    scores = localize(base, build("qwen2", **SIZES), [{"input_ids": batch(), "labels": batch()}], show_progress=False)
    assert scores["model.layers.0.mlp.up_proj"].shape == (128,)
    assert scores["model.layers.0.mlp.up_proj"].sum() > 0
