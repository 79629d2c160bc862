"""Export to LoRA: exact factors that stock PEFT loads without act_peft, and the best ones of a given rank."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from act_peft import ActConfig, export_lora
from act_peft.channels.masks import ChannelMask
from act_peft.export import Biases
from act_peft.layers import ActLayer
from tests.support.exports import (
    OUTER,
    QUERY,
    TOLERANCES,
    adapted,
    change_record,
    config_of,
    dense,
    layers_of,
    product,
    tensors_of,
)
from tests.support.tiny_models import DTYPES, FAMILIES, batch, build, random_mask

pytestmark = [
    # PEFT says so of every LoRA adapter of tied embeddings, and of GPT-2, whose layers are of both orientations.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

# ------------------------------------------------------------------------------------------------------ stock PEFT ---

VARIANTS = {
    "plain": ({}, {}),
    "uniform": ({}, {"uniform_rank": True}),
    "lora_bias": ({"biases": True}, {"biases": "lora_bias"}),
    "whole": ({"biases": True, "norms": True}, {"biases": "modules_to_save"}),
}
CASES = [
    (variant, family, dtype)
    for variant in VARIANTS
    for family in sorted(FAMILIES)
    for dtype in DTYPES
    if variant != "lora_bias" or family in ("qwen2", "gpt2")
]
SCRIPT = """
import sys, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
ids = load_file("ids.safetensors")["ids"]
logits = {}
for line in open("cases.txt"):
    case, base = line.split()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    loaded = PeftModel.from_pretrained(model, case)
    result = loaded.load_adapter(case, "again")
    assert not result.missing_keys and not result.unexpected_keys, result
    with torch.no_grad():
        logits[case] = loaded(ids).logits
assert "act_peft" not in sys.modules
save_file(logits, "logits.safetensors")
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Case -> logits of the base, of the ACT model, and of stock PEFT in a process that never imports act_peft."""
    folder = tmp_path_factory.mktemp("stock")
    lines, results = [], {}
    for variant, family, dtype in CASES:
        location = folder / f"base-{family}-{dtype}"
        if not location.exists():
            build(family, dtype=dtype).save_pretrained(location)
        base = AutoModelForCausalLM.from_pretrained(location, dtype="auto").eval()
        with torch.no_grad():
            before = base(batch()).logits.clone()
            settings, options = VARIANTS[variant]
            if variant == "lora_bias":
                mask = random_mask(base, 0.4)
                settings = {**settings, "channels": {n: mask[n] for n in mask if "mlp" in n or "attn." in n}}
            model = adapted(base, **settings)
            results[variant, family, dtype] = before, model(batch()).logits
        case = f"{variant}-{family}-{dtype}"
        export_lora(model, folder / case, **options)
        lines.append(f"{case} {location}")
    (folder / "cases.txt").write_text("\n".join(lines))
    save_file({"ids": batch()}, folder / "ids.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=environment, check=True)
    logits = load_file(folder / "logits.safetensors")
    return {case: (*both, logits[f"{case[0]}-{case[1]}-{case[2]}"]) for case, both in results.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_stock_peft_gives_the_same_logits(stock, case):
    base, expected, found = stock[case]
    tolerance = TOLERANCES[case[2]]
    assert (expected - base).abs().max() > 5 * tolerance["atol"]
    torch.testing.assert_close(found, expected, **tolerance)


# --------------------------------------------------------------------------------------------------- exact factors ---


def count(layer: ActLayer) -> int:
    return layer.act_delta_index["default"].numel()


def test_the_factors_are_exact(family, dtype, tmp_path):
    model = adapted(build(family, dtype=dtype))
    result = export_lora(model, tmp_path / "lora")
    tensors, layers = tensors_of(tmp_path / "lora"), layers_of(model)
    assert result.folder == tmp_path / "lora"
    assert result.saved_modules == ()
    assert result.ranks == {name: min(dense(layer).shape[1], count(layer)) for name, layer in layers.items()}
    assert result.errors == dict.fromkeys(layers, 0.0)
    assert (result.error, result.rank_for_5_percent) == (0.0, None)
    assert result.size == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        assert torch.equal(product(tensors, name), dense(layer))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}  # the dtype of the deltas


def test_the_factors_are_one_hot_and_the_rows(tmp_path):
    model = adapted(build("llama"), channels={QUERY: [0, 3, 15]})
    export_lora(model, tmp_path / "lora")
    tensors = tensors_of(tmp_path / "lora")
    assert torch.equal(
        tensors[f"{OUTER}{QUERY}.lora_A.weight"], layers_of(model)[QUERY].act_delta_weight["default"].detach()
    )
    assert torch.equal(tensors[f"{OUTER}{QUERY}.lora_B.weight"], torch.eye(16)[:, [0, 3, 15]])


def test_the_factors_have_the_dtype_of_the_deltas(tmp_path):
    config = ActConfig(channels={QUERY: [0, 3]}, init_weights=False)
    model = get_peft_model(build("llama", dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    export_lora(model, tmp_path / "lora")
    tensors = tensors_of(tmp_path / "lora")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(product(tensors, QUERY), dense(layers_of(model)[QUERY]))


def test_the_configuration(tmp_path):
    model = adapted(build("llama"), channels={"q_proj": [0, 3], "lm_head": [1, 2, 5]})
    model.peft_config["default"].base_model_name_or_path = "org/base"
    export_lora(model, tmp_path / "lora")
    config = config_of(tmp_path / "lora")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    pattern = {"^" + name.replace(".", r"\."): 2 for name in names}
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "target_modules": ["lm_head", *names],
        "r": 3,
        "lora_alpha": 3,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "exclude_modules": None,
    }
    assert {key: config[key] for key in expected} == expected


def test_fan_in_fan_out_follows_the_modules(tmp_path):
    export_lora(adapted(build("gpt2"), channels={"lm_head": [1]}), tmp_path / "linear")
    export_lora(adapted(build("gpt2"), channels={"c_fc": [1]}), tmp_path / "conv1d")
    assert config_of(tmp_path / "linear")["fan_in_fan_out"] is False
    assert config_of(tmp_path / "conv1d")["fan_in_fan_out"] is True


def test_scales_are_part_of_the_factors(tmp_path):
    model = adapted(build("qwen2"), channels={"q_proj": [0, 3], "embed_tokens": [1]}, biases=True)
    model.base_model.set_scale("default", -0.5)
    export_lora(model, tmp_path / "lora", biases="modules_to_save")
    tensors, layers = tensors_of(tmp_path / "lora"), layers_of(model)
    assert torch.equal(product(tensors, "model.embed_tokens"), dense(layers["model.embed_tokens"]))
    merged = copy.deepcopy(model).merge_and_unload().get_submodule(QUERY)
    for part in ("weight", "bias"):
        assert torch.equal(tensors[f"{OUTER}{QUERY}.{part}"], getattr(merged, part))


def test_a_merged_adapter_is_exported_as_before(tmp_path):
    model = adapted(build("qwen2"), norms=True, biases=True)
    export_lora(model, tmp_path / "before", biases="modules_to_save")
    model.merge_adapter()
    export_lora(model, tmp_path / "merged", biases="modules_to_save")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


@pytest.mark.parametrize("recorded", [True, False], ids=["kind recorded", "kind from shapes"])
def test_a_folder_gives_the_same_files_as_the_model(family, dtype, recorded, tmp_path):
    base = build(family, dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, norms=True, biases=True)
    model.save_pretrained(tmp_path / "act")
    if not recorded:
        change_record(tmp_path / "act", lambda entry: entry.pop("kind"))
    ours = export_lora(model, tmp_path / "a", biases=Biases.MODULES_TO_SAVE)
    theirs = export_lora(tmp_path / "act", tmp_path / "b", biases="modules_to_save", base=tmp_path / "base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert dataclasses.replace(ours, folder=theirs.folder) == theirs


def test_a_folder_is_exported_without_a_model(tmp_path):
    model = adapted(build("llama"))
    model.save_pretrained(tmp_path / "act")
    export_lora(str(tmp_path / "act"), str(tmp_path / "lora"), adapter_name="default")
    for name, layer in layers_of(model).items():
        assert torch.equal(product(tensors_of(tmp_path / "lora"), name), dense(layer))
    assert "Made from `act`" in (tmp_path / "lora" / "README.md").read_text()


def test_what_the_adapter_saves_as_a_whole_goes_along(tmp_path):
    base = build("llama")
    fresh = copy.deepcopy(base)
    model = adapted(base, channels={"q_proj": [0, 3]}, modules_to_save=["lm_head"], trainable_token_indices=[3, 5, 7])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(batch()).logits, model(batch()).logits, **TOLERANCES[torch.float32])


def test_another_adapter_of_the_model(tmp_path):
    model = adapted(build("llama"), channels={"q_proj": [0, 3]})
    model.add_adapter("other", ActConfig(channels={"up_proj": [1]}, init_weights=False))
    result = export_lora(model, tmp_path / "lora", adapter_name="other")
    assert list(result.ranks) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


# ---------------------------------------------------------------------------------------------------- names, ranks ---


class Nested(nn.Module):
    """Modules whose names are ends of one another; one of them is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6, bias=False)
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 5, bias=False)})
        self.other = nn.ModuleDict({"proj": nn.Linear(5, 7, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other["proj"](self.block["proj"](self.proj(x)))


def test_names_mean_one_module_each(tmp_path):
    torch.manual_seed(0)
    base = Nested()
    fresh = copy.deepcopy(base)
    mask = ChannelMask({"proj": [0, 2, 5], "block.proj": [1]}, {"proj": 6, "block.proj": 5})
    model = get_peft_model(base, ActConfig(channels=mask, init_weights=False, exclude_modules=["other.proj"]))
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora")
    found = {n: m.r["default"] for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found == {"proj": 3, "block.proj": 1}
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("max_rank", [1, 3, 5])
def test_beyond_max_rank_the_approximation_is_the_best(family, max_rank, tmp_path):
    model = adapted(build(family))
    result = export_lora(model, tmp_path / "lora", max_rank=max_rank)
    tensors = tensors_of(tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    approximated = 0
    for name, layer in layers_of(model).items():
        delta, found = dense(layer), product(tensors, name)
        exact = min(count(layer), delta.shape[1])
        assert result.ranks[name] == min(exact, max_rank)
        assert f"| {name} | {result.ranks[name]} | {result.errors[name]:.3g} |" in card
        if exact <= max_rank:
            assert result.errors[name] == 0
            assert torch.equal(found, delta)
            continue
        approximated += 1
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        best = (u[:, :max_rank] * s[:max_rank]) @ vh[:max_rank]
        torch.testing.assert_close(found.double(), best, rtol=1e-5, atol=1e-5)
        error = torch.linalg.norm(delta.double() - best) / torch.linalg.norm(delta.double())
        assert math.isclose(result.errors[name], float(error), rel_tol=1e-4)
    assert approximated
    assert f"approximated modules: {approximated};" in card


@pytest.mark.parametrize("max_rank", [None, 4])
def test_uniform_rank_fills_up_with_zeros(family, max_rank, tmp_path):
    model = adapted(build(family))
    export_lora(model, tmp_path / "own", max_rank=max_rank)
    result = export_lora(model, tmp_path / "uniform", max_rank=max_rank, uniform_rank=True)
    config, own = config_of(tmp_path / "uniform"), config_of(tmp_path / "own")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert own["rank_pattern"] == own["alpha_pattern"]
    assert (own["rank_pattern"] == {}) == (family == "gpt2" and max_rank == 4)  # all of its modules have more channels
    assert config["r"] == config["lora_alpha"] == own["r"] == own["lora_alpha"]
    assert set(result.ranks.values()) == {config["r"]}
    tensors = tensors_of(tmp_path / "uniform")
    assert {tensor.shape["lora_A" not in key and "embedding_A" not in key] for key, tensor in tensors.items()} == {
        config["r"]
    }
    for name in result.ranks:
        torch.testing.assert_close(product(tensors, name), product(tensors_of(tmp_path / "own"), name))


# ------------------------------------------------------------------------------------------- PEFT's own conversion ---


@pytest.mark.parametrize(
    ("family", "modules"), [("llama", ["q_proj", "down_proj"]), ("qwen2", ["q_proj"]), ("gpt2", ["c_fc", "c_attn"])]
)
@pytest.mark.parametrize("rank", [4, 0.999999])
@pytest.mark.parametrize("named", [False, True])
def test_peft_converts_linear_layers(family, modules, rank, named, tmp_path):
    base = build(family)
    fresh = copy.deepcopy(base)
    targets = modules if named else None
    model = adapted(base, channels={name: [0, 3, 7, 9] for name in modules}, target_modules=targets)
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path / "lora", model, rank=rank)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(
        loaded(batch()).logits, model(batch()).logits, rtol=1e-4, atol=1e-4
    )  # an SVD in float32


@pytest.mark.parametrize("channels", [{"q_proj": [0]}, {"embed_tokens": [1]}, {"norm": [1]}])
def test_peft_refuses_what_it_would_lose(channels, tmp_path):
    model = adapted(build("qwen2"), channels=channels, biases=True, target_modules=list(channels))
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        save_as_lora(tmp_path / "lora", model, rank=1)


def test_peft_refuses_adapters_that_are_not_there(saved, tmp_path):
    model, folder = saved
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        save_as_lora(tmp_path / "lora", model, rank=1, adapter_name="other")
    waiting = get_peft_model(build("llama"), ActConfig.from_pretrained(folder))
    assert not waiting.supports_lora_conversion()
