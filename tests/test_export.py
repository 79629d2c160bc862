"""Export to LoRA: exact factors that stock PEFT loads without act_peft, and the best ones of a given rank."""

from __future__ import annotations

import copy
import dataclasses
import json
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
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

import act_peft.export.plan
from act_peft import ActConfig, ActLoadError, ActTypeError, ActValueError, export_lora
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.masks import ChannelMask
from act_peft.export import Biases
from act_peft.export.factors import factors
from act_peft.layers import ActLayer
from tests.support.tiny_models import DECODER, DTYPES, FAMILIES, batch, build, random_mask

QUERY = "model.layers.0.self_attn.q_proj"
OUTER = "base_model.model."
# LoRA multiplies with two matrices and rounds elsewhere. In bfloat16 (8 bits, logits of up to 4) every layer rounds:
# the same adapter merged is up to 0.1 away from itself in float32. The deltas change the logits by far more, see
# `test_stock_peft_gives_the_same_logits`.
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 5e-6}, torch.bfloat16: {"rtol": 0.0, "atol": 2**-3}}

pytestmark = [
    # PEFT says so of every LoRA adapter of tied embeddings, and of GPT-2, whose layers are of both orientations.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]


def layers_of(model: nn.Module) -> dict[str, ActLayer]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, ActLayer)}


def adapted(base: nn.Module, *, norms: bool = False, biases: bool = False, channels=None, **settings) -> PeftModel:
    """A model with random deltas, small enough for a tiny model; those of norms and biases only where asked for."""
    if channels is None:
        mask = random_mask(base, 0.4)
        kept = [n for n in mask if norms or base.get_submodule(n).weight.dim() == 2]
        channels = ChannelMask({n: mask[n] for n in kept}, {n: mask.num_channels[n] for n in kept})
    torch.manual_seed(0)
    config = ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config).eval()
    for layer in layers_of(model).values():
        layer.act_delta_weight["default"].data.mul_(0.15)
        if layer.has_bias:
            layer.act_delta_bias["default"].data.mul_(0.15 if biases else 0)
    return model


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """B @ A of one module, `[O, I]`."""
    embedding = f"{OUTER}{name}.lora_embedding_A"
    if embedding in tensors:
        return tensors[f"{OUTER}{name}.lora_embedding_B"] @ tensors[embedding]
    return tensors[f"{OUTER}{name}.lora_B.weight"] @ tensors[f"{OUTER}{name}.lora_A.weight"]


def dense(layer: ActLayer) -> torch.Tensor:
    """The delta of one module, `[O, I]`."""
    delta = layer.get_delta_weight("default")
    return delta.T if layer.kind in (ChannelKind.CONV1D, ChannelKind.EMBEDDING) else delta


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


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


def test_the_factors_are_exact(family, dtype, tmp_path):
    model = adapted(build(family, dtype=dtype))
    result = export_lora(model, tmp_path / "lora")
    tensors, layers = tensors_of(tmp_path / "lora"), layers_of(model)
    assert result.folder == tmp_path / "lora"
    assert result.saved_modules == ()
    assert result.ranks == {name: layer.act_delta_index["default"].numel() for name, layer in layers.items()}
    assert result.errors == dict.fromkeys(layers, 0.0)
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
        count = layer.act_delta_index["default"].numel()
        assert result.ranks[name] == min(count, max_rank)
        assert f"| {name} | {result.ranks[name]} | {result.errors[name]:.3g} |" in card
        if count <= max_rank:
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


def test_factors_of_few_inputs_are_exact():
    rows = torch.randn(9, 4)
    left, right, error = factors(rows, 5)
    assert left.shape == (9, 4)
    assert torch.equal(left @ right, rows)
    assert error == 0


def test_factors_of_zeros():
    left, right, error = factors(torch.zeros(9, 6), 2)
    assert torch.equal(left @ right, torch.zeros(9, 6))
    assert error == 0


def test_factors_keep_the_dtype():
    left, right, error = factors(torch.randn(9, 6).bfloat16(), 2)
    assert left.dtype == right.dtype == torch.bfloat16
    assert 0 < error < 1


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


# ------------------------------------------------------------------------------------------------ biases and norms ---


def test_biases_and_norms_are_named(tmp_path):
    model = adapted(build("qwen2"), biases=True, norms=True)
    with pytest.raises(ActValueError, match=r"layers\.0\.self_attn\.k_proj, .* and 3 more: deltas .*merge_checkpoint"):
        export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_deltas_that_are_zero_do_not_matter(tmp_path):
    model = adapted(build("qwen2"), norms=True, biases=True)
    for layer in layers_of(model).values():
        if layer.has_bias:
            layer.act_delta_bias["default"].data.zero_()
        if layer.kind.is_norm:
            layer.act_delta_weight["default"].data.zero_()
    result = export_lora(model, tmp_path / "lora")
    assert set(result.ranks) == {name for name, layer in layers_of(model).items() if not layer.kind.is_norm}


def test_lora_bias_without_biases_is_plain(tmp_path):
    export_lora(adapted(build("llama")), tmp_path / "lora", biases="lora_bias")
    assert config_of(tmp_path / "lora")["lora_bias"] is False


def test_lora_bias_is_exact(tmp_path):
    model = adapted(build("qwen2"), channels={"q_proj": [0, 3], "up_proj": [2]}, biases=True)
    export_lora(model, tmp_path / "lora", biases="lora_bias")
    tensors = tensors_of(tmp_path / "lora")
    expected = torch.zeros(16).index_copy(
        0, torch.tensor([0, 3]), layers_of(model)[QUERY].act_delta_bias["default"].detach()
    )
    assert torch.equal(tensors[f"{OUTER}{QUERY}.lora_B.bias"], expected)
    assert torch.equal(tensors[f"{OUTER}model.layers.0.mlp.up_proj.lora_B.bias"], torch.zeros(24))
    assert config_of(tmp_path / "lora")["lora_bias"] is True


@pytest.mark.parametrize(
    ("channels", "named"),
    [({"q_proj": [0], "embed_tokens": [1]}, "model.embed_tokens"), ({"q_proj": [0], "norm": [1]}, "model.norm")],
)
def test_lora_bias_is_for_linear_layers(channels, named, tmp_path):
    model = adapted(build("qwen2"), channels=channels, biases=True)
    with pytest.raises(ActValueError, match=f"{named}: biases='lora_bias' is only for linear layers"):
        export_lora(model, tmp_path / "lora", biases="lora_bias")


@pytest.mark.parametrize(("biases", "channels"), [("error", {"norm": [1]}), ("modules_to_save", {"q_proj": [1]})])
def test_something_must_be_left_for_lora(biases, channels, tmp_path):
    model = adapted(build("qwen2"), channels=channels, biases=True)
    if biases == "error":
        layers_of(model)["model.norm"].act_delta_weight["default"].data.zero_()
    with pytest.raises(ActValueError, match="no module is left for LoRA, expected at least one"):
        export_lora(model, tmp_path / "lora", biases=biases)


def test_whole_modules_whose_name_means_others_are_refused(tmp_path):
    base = nn.ModuleDict(
        {"proj": nn.Linear(4, 6), "other_proj": nn.Linear(4, 6), "plain": nn.Linear(4, 4, bias=False)}
    )
    mask = ChannelMask({"proj": [0], "plain": [1]}, {"proj": 6, "plain": 4})
    model = get_peft_model(base, ActConfig(channels=mask, init_weights=False))
    with pytest.raises(
        ActValueError, match="proj: cannot be saved as a whole, because PEFT would save other_proj too"
    ):
        export_lora(model, tmp_path / "lora", biases="modules_to_save")


# -------------------------------------------------------------------------------------------------------- refusals ---


@pytest.fixture
def saved(tmp_path):
    """A model with an adapter of q_proj and down_proj, and the adapter's folder."""
    model = adapted(build("llama"), channels={"q_proj": [0, 3], "down_proj": list(range(16))})
    model.save_pretrained(tmp_path / "act")
    return model, tmp_path / "act"


def change_record(folder, change, name=None) -> None:
    config = config_of(folder)
    for module, entry in config["adapted_modules"].items():
        if name in (None, module):
            change(entry)
    (folder / "adapter_config.json").write_text(json.dumps(config))


OPTIONS = {
    "unknown choice": ({"biases": "drop"}, ActValueError, r"biases: got 'drop', expected one of 'error', 'lora_bias'"),
    "rank of zero": ({"max_rank": 0}, ActValueError, "max_rank: got 0, expected an integer of at least 1"),
    "rank of a half": ({"max_rank": 0.5}, ActTypeError, "max_rank: got 0.5, expected an integer"),
    "rank of truth": ({"max_rank": True}, ActTypeError, "max_rank: got True, expected an integer"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_can_never_be_right(saved, tmp_path, option):
    settings, error, match = OPTIONS[option]
    with pytest.raises(error, match=match):
        export_lora(saved[0], tmp_path / "lora", **settings)


def test_options_that_do_not_go_together(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ActValueError, match="base: got one together with a model in memory"):
        export_lora(model, tmp_path / "lora", base="base", biases="modules_to_save")
    with pytest.raises(ActValueError, match="adapter_name: got 'other' with a folder"):
        export_lora(folder, tmp_path / "lora", adapter_name="other")
    with pytest.raises(ActValueError, match=r"base: needed for biases='modules_to_save'.* got base=None"):
        export_lora(folder, tmp_path / "lora", biases="modules_to_save")
    with pytest.raises(ActValueError, match=r"base: needed .* and only there; got base='base' with biases='error'"):
        export_lora(folder, tmp_path / "lora", base="base")
    with pytest.raises(ActTypeError, match="export_lora: got int, expected a model with an ACT adapter"):
        export_lora(3, tmp_path / "lora")


def test_models_without_the_adapter_or_its_tensors(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ActValueError, match="has no ACT adapter 'other'"):
        export_lora(model, tmp_path / "lora", adapter_name="other")
    waiting = get_peft_model(build("llama"), ActConfig.from_pretrained(folder))
    with pytest.raises(ActValueError, match="adapter 'default' has no tensors yet, expected a loaded adapter"):
        export_lora(waiting, tmp_path / "lora")


@pytest.mark.parametrize(
    ("part", "biases"),
    [(part, biases) for part in ("weight", "bias") for biases in ("lora_bias", "modules_to_save")]
    + [("norm", "modules_to_save")],
)
def test_deltas_that_are_not_finite_are_refused(part, biases, tmp_path):
    channels = {"q_proj": [0, 3], "up_proj": [1], **({"norm": [1]} if biases == "modules_to_save" else {})}
    model = adapted(build("qwen2"), channels=channels, biases=True)
    layers = layers_of(model)
    if part == "norm":
        broken = layers["model.norm"].act_delta_weight
    else:
        broken = layers[QUERY].act_delta_weight if part == "weight" else layers[QUERY].act_delta_bias
    broken["default"].data.flatten()[0] = math.nan
    with pytest.raises(ActValueError, match="the deltas hold NaN or infinity"):
        export_lora(model, tmp_path / "lora", biases=biases)
    assert list(tmp_path.iterdir()) == []


def put(key, value):
    return lambda entry: entry.__setitem__(key, value)


RECORDS = {
    "no channels": (lambda entry: entry.pop("channels"), "adapted_modules says None channels"),
    "channels of another kind": (put("channels", "16"), "adapted_modules says 16 channels"),
    "too few channels": (put("channels", 3), "says 3 channels, expected a number greater than .* channel, 3"),
    "unknown kind": (put("kind", "tensor"), "says it is a 'tensor', expected one of 'linear'.*upgrade act_peft"),
    "another kind": (put("kind", "embedding"), r"act_delta_weight has \[2, 16\], expected that of a embedding with 2"),
    "a norm": (put("kind", "RMS norm"), r"act_delta_weight has \[2, 16\], expected that of a RMS norm"),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_records_that_do_not_fit_the_tensors_are_refused(saved, tmp_path, damage):
    change, match = RECORDS[damage]
    change_record(saved[1], change, QUERY)
    with pytest.raises(ActLoadError, match=match):
        export_lora(saved[1], tmp_path / "lora")


def test_channels_that_are_only_claimed_are_not_allocated(saved, tmp_path):
    change_record(saved[1], put("channels", 10**15), QUERY)
    with pytest.raises(ActValueError, match=r"the disk has .* GB free, expected at least"):
        export_lora(saved[1], tmp_path / "lora")


def test_square_deltas_of_unknown_kind_are_refused(tmp_path):
    model = adapted(build("llama"), channels={"q_proj": list(range(16))})
    model.save_pretrained(tmp_path / "act")
    export_lora(tmp_path / "act", tmp_path / "lora")
    change_record(tmp_path / "act", lambda entry: entry.pop("kind"))
    with pytest.raises(ActLoadError, match="does not say whether it is a linear or a embedding, and its delta is sq"):
        export_lora(tmp_path / "act", tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("task_type", "NONE_SUCH", r"adapter_config.json cannot be used \(Invalid task type"),
        ("adapted_modules", 3, "adapted_modules: got 3"),
        ("adapted_modules", {QUERY: {"selected": 2, "kind": 3}}, "adapted_modules: got .*'kind': 3"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(saved, tmp_path, key, value, match):
    path = saved[1] / "adapter_config.json"
    path.write_text(json.dumps({**config_of(saved[1]), key: value}))
    with pytest.raises(ActValueError, match=match):
        export_lora(saved[1], tmp_path / "lora")


def test_a_base_of_another_shape_is_refused(tmp_path):
    build("qwen2", hidden_size=32).save_pretrained(tmp_path / "base")
    adapted(build("qwen2"), channels={"q_proj": [1], "up_proj": [2]}, biases=True).save_pretrained(tmp_path / "act")
    match = r"has a weight torch\.float32 \[32, 32\], expected plain numbers of shape \[16, 16\]"
    with pytest.raises(ActLoadError, match=match):
        export_lora(tmp_path / "act", tmp_path / "lora", biases="modules_to_save", base=tmp_path / "base")


def test_a_tied_head_with_a_bias_is_saved_as_a_whole_from_the_checkpoint(tmp_path):
    settings = {"num_key_value_heads": 4, "tie_word_embeddings": True, "partial_rotary_factor": 0.5}
    config = PhiConfig(**{**DECODER, **settings})
    torch.manual_seed(0)
    base = PhiForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    model = adapted(base, channels={"lm_head": [1, 5], "q_proj": [2]})
    layers_of(model)["lm_head"].act_delta_bias["default"].data.fill_(0.5)
    model.save_pretrained(tmp_path / "act")
    from_memory = export_lora(model, tmp_path / "memory", biases="modules_to_save")
    from_disk = export_lora(tmp_path / "act", tmp_path / "disk", biases="modules_to_save", base=tmp_path / "base")
    assert from_disk.saved_modules == from_memory.saved_modules == ("lm_head",)
    expected = load_file(tmp_path / "memory" / "adapter_model.safetensors")
    found = load_file(tmp_path / "disk" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# --------------------------------------------------------------------------------------------- whole or not at all ---


def test_an_output_that_exists_is_refused(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ActValueError, match="expected a folder outside it"):
        export_lora(folder, folder / "lora")
    export_lora(model, tmp_path / "lora", max_rank=1)
    before = tensors_of(tmp_path / "lora")
    with pytest.raises(ActValueError, match=r"lora: exists, expected a new folder .*overwrite=True"):
        export_lora(model, tmp_path / "lora")
    assert tensors_of(tmp_path / "lora").keys() == before.keys()
    export_lora(model, tmp_path / "lora", overwrite=True)
    assert torch.equal(product(tensors_of(tmp_path / "lora"), QUERY), dense(layers_of(model)[QUERY]))


@pytest.mark.parametrize("step", ["_write_tensors", "_write_card", "factors"])
def test_nothing_is_left_after_a_failure(saved, tmp_path, monkeypatch, step):
    model, _ = saved
    export_lora(model, tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(act_peft.export, step, fail)
    for name in ("new", "lora"):
        with pytest.raises(ActValueError, match=f"{name}: cannot be written .*nothing was left behind"):
            export_lora(model, tmp_path / name, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["act", "lora"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before


def test_the_same_adapter_gives_the_same_bytes(saved, tmp_path):
    for name in ("a", "b"):
        export_lora(saved[0], tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


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
