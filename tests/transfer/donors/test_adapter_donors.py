"""LoRA and ACT adapters as donors, against models with the adapter merged; in memory and on disk."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from act_peft import ActConfig, ActLoadError, ActValueError, ActWarning, create_adapter, initialize_from_donor
from act_peft.channels.kinds import channel_kind
from act_peft.disk import locations
from tests.support.tiny_models import build, random_mask

LINEAR = ["q_proj", "up_proj", "down_proj"]
# name -> (family, LoRA's settings)
LORAS = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {r"layers\.0\..*": 3, "q_proj": 5},
        },
    ),
    "rank-stabilised": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "LoRA's own bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "every bias": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}
# What PEFT says of tied models, of embeddings, and of a bias of its own among the factors.
PEFT_SAYS = (
    "Model (has|with) `tie_word_embeddings=True`|Input and output embeddings are no longer|Setting `save_embedding|"
    "Adapter 'default'"
)
pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_SAYS}")


def save_lora(family, folder, **settings):
    """A random LoRA adapter of `build(family)` in a folder; the base with it merged."""
    torch.manual_seed(3)
    model = get_peft_model(build(family), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "modules_to_save" in name or (settings.get("bias") and name.endswith("bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.merge_and_unload()


def check_deltas(model, base, merged):
    for name, index in random_mask(base, 0.5).items():
        layer, mine, theirs = (m.get_submodule(name) for m in (model.get_base_model(), base, merged))
        dim = channel_kind(mine).channel_dim
        expected = (theirs.weight - mine.weight).index_select(dim, index)
        torch.testing.assert_close(layer.act_delta_weight["default"], expected, msg=lambda m, n=name: f"{n}: {m}")
        if getattr(mine, "bias", None) is not None:
            torch.testing.assert_close(layer.act_delta_bias["default"], (theirs.bias - mine.bias)[index])


@pytest.mark.parametrize("what", LORAS)
def test_a_lora_adapter_gives_what_the_merged_model_gives(what, tmp_path):
    family, settings = LORAS[what]
    merged, base = save_lora(family, tmp_path, **settings), build(family)
    config = ActConfig(channels=random_mask(base, 0.5), donor=str(tmp_path), transfer_scale=1.0)
    model = get_peft_model(copy.deepcopy(base), config)
    check_deltas(model, base, merged)
    changed = {n for n, p in model.named_parameters() if "act_delta_" in n and bool(p.any())}
    assert changed, "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("what", ["plain", "DoRA", "Conv1D"])
def test_the_same_on_disk_byte_by_byte(what, tmp_path):
    family, settings = LORAS[what]
    save_lora(family, tmp_path / "lora", **settings)
    base = build(family)
    base.save_pretrained(tmp_path / "base")
    mask = random_mask(base, 0.5)
    config = ActConfig(channels=mask, donor=str(tmp_path / "lora"), transfer_scale=0.3, task_type="CAUSAL_LM")
    get_peft_model(type(base).from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "memory")
    create_adapter(tmp_path / "base", tmp_path / "lora", mask, tmp_path / "disk", transfer_scale=0.3)
    for path in (tmp_path / "memory").iterdir():
        assert (tmp_path / "disk" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_act_adapter_gives_its_deltas_where_it_has_some(family, tmp_path):
    torch.manual_seed(3)
    mask = random_mask(build(family), 0.4, seed=7)
    donor = get_peft_model(build(family), ActConfig(channels=mask, init_weights=False))
    donor.save_pretrained(tmp_path)
    base = build(family)
    model = get_peft_model(copy.deepcopy(base), ActConfig(channels=random_mask(base, 0.5)))
    initialize_from_donor(model, str(tmp_path), transfer_scale=1.0)
    check_deltas(model, base, donor.merge_and_unload())
    assert model.peft_config["default"].donor == str(tmp_path)


def test_an_act_adapter_of_another_base_is_said(tmp_path):
    get_peft_model(build("llama", seed=5), ActConfig(channels={"up_proj": [1]}, init_weights=False)).save_pretrained(
        tmp_path
    )
    config = ActConfig(channels={"up_proj": [1]}, donor=str(tmp_path))
    with pytest.warns(ActWarning, match=r"donor was made for a base with other weights: 2 of \d+ modules differ"):
        get_peft_model(build("llama"), config)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONFIGS = {
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "uses alora_invocation_tokens, expected plain LoRA"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights='pissa_niter_4'"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "uses target_parameters"),
    "another method": ({"peft_type": "IA3"}, "got an adapter of type IA3, expected LoRA or ACT"),
    "too many patterns": (
        {"alpha_pattern": {f"{n}": 1 for n in range(200)}},
        "alpha_pattern: got 200 regular expressions, expected at most",
    ),
    "no alpha": (
        {"lora_alpha": "x"},
        "adapter_config.json: lora_alpha of .*q_proj: got 'x', expected a finite number",
    ),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "is not JSON .got Infinity, expected finite numbers"),
    "a huge alpha": ({"lora_alpha": 10**399}, "lora_alpha of .*q_proj: got 1000.*, expected a finite number"),
    "no rank": ({"r": 0}, "rank of .*q_proj: got 0, expected an integer of at least 1"),
    "another rank": ({"r": 8}, r"q_proj has factors of rank \[4\], expected 8 by its adapter_config.json"),
    "a flag": ({"use_rslora": "no"}, "use_rslora is no, expected true or false"),
    "a bias": ({"bias": "some"}, "bias is some, expected one of"),
    "biases of factors that are missing": ({"lora_bias": True}, "q_proj has no lora_B.bias, expected one by its"),
    "magnitudes that are missing": ({"use_dora": True}, "q_proj has no lora_magnitude_vector, expected one by its"),
    "no list of modules": ({"modules_to_save": "lm_head"}, "modules_to_save is lm_head, expected names"),
    "a module that is missing": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save has 'lm_head', expected its tensors",
    ),
    "targets that are missing": (
        {"target_modules": ["q_proj", "k_proj"]},
        "target_modules has 'k_proj', expected its",
    ),
    "trained tokens": ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
    "a setting of tomorrow": ({"use_tomorrow": True}, "uses use_tomorrow, expected plain LoRA, rsLoRA or DoRA"),
    "no patterns": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is .*, expected names of modules"),
    "a broken pattern": (
        {"alpha_pattern": {"[": 1}},
        r"alpha_pattern: regular expression .*: unterminated character set",
    ),
}


def refused(folder, match, error=ActValueError, base=None):
    base = build("llama") if base is None else base
    structure = [name for name, _ in base.named_modules()]
    with pytest.raises(error, match=match):
        get_peft_model(base, ActConfig(channels={"q_proj": [1], "lm_head": [2]}, donor=str(folder)))
    assert [name for name, _ in base.named_modules()] == structure


@pytest.mark.parametrize("what", CONFIGS)
def test_lora_that_has_no_rows_is_refused(what, tmp_path):
    changes, match = CONFIGS[what]
    save_lora("llama", tmp_path, target_modules=["q_proj"])
    change_config(tmp_path, **changes)
    refused(tmp_path, match)


def test_other_adapters_are_refused(tmp_path):
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    refused(tmp_path, "got an adapter of type IA3, expected LoRA or ACT .*merge_and_unload")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
TENSORS = {
    "one factor": (KEY.format("A"), None, "q_proj has no lora_A, expected one by its adapter_config.json"),
    "another length": (KEY.format("B"), torch.ones(17, 4), r"has .*lora_B.weight F32 \[17, 4\], which does not fit"),
    "another width": (KEY.format("A"), torch.ones(4, 15), r"has .*lora_A.weight F32 \[4, 15\], which does not fit"),
    "another rank": (KEY.format("A"), torch.ones(5, 16), r"has factors of rank \[5\], expected 4"),
    "one rank of two": (KEY.format("B"), torch.ones(16, 5), r"has .*lora_B.weight F32 \[16, 5\], which does not fit"),
    "integers": (KEY.format("A"), torch.ones(4, 16, dtype=torch.int32), "lora_A.weight I32 .*does not fit"),
    "another tensor": ("base_model.model.x.ia3_l", torch.ones(3), "x.ia3_l is no factor of plain LoRA"),
    "another name": ("model.x.lora_A.weight", torch.ones(3), "x.lora_A.weight is no factor of plain LoRA"),
    "another module": (
        "base_model.model.model.other.weight",
        torch.ones(3),
        "adapts model.other, which the base",
    ),
    "a magnitude": (
        KEY.format("A").replace("lora_A.weight", "lora_magnitude_vector"),
        torch.ones(3),
        "q_proj has a lora_magnitude_vector, expected none by its adapter_config.json",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_factors_that_do_not_fit_are_refused(what, tmp_path):
    key, tensor, match = TENSORS[what]
    save_lora("llama", tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name != key}
    save_file(tensors if tensor is None else {**tensors, key: tensor}, path)
    refused(tmp_path, match)


def test_a_layer_that_is_missing_in_the_file_is_refused(tmp_path):
    save_lora("llama", tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1." not in name}, path)
    refused(tmp_path, r"the base has model\.layers\.1\.self_attn\.q_proj, expected its tensors in the file too")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_missing_are_refused(tmp_path, bias):
    save_lora("qwen2", tmp_path, target_modules=["q_proj"], bias=bias)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "q_proj.base_layer.bias" not in name}, path)
    refused(tmp_path, f"bias='{bias}'", base=build("qwen2"))


@pytest.mark.parametrize("part", ["lora_A", "lora_magnitude_vector"])
def test_parts_of_dora_that_are_missing_are_refused(tmp_path, part):
    save_lora("llama", tmp_path, target_modules=["q_proj"], use_dora=True)
    path = tmp_path / "adapter_model.safetensors"
    left_out = {"lora_A": ("lora_A", "lora_B")}.get(part, (part,))
    save_file({name: v for name, v in load_file(path).items() if not any(each in name for each in left_out)}, path)
    refused(tmp_path, "magnitude_vector, expected")


def test_magnitudes_of_columns_are_refused(tmp_path):
    save_lora("gpt2", tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    with pytest.raises(ActValueError, match="uses DoRA on a module whose channels are columns"):
        get_peft_model(build("gpt2"), ActConfig(channels={"c_attn": [1]}, donor=str(tmp_path)))


@pytest.mark.parametrize(
    ("base", "what"), [({"intermediate_size": 32}, "down_proj"), ({"num_attention_heads": 2, "head_dim": 4}, "q_proj")]
)
def test_an_act_adapter_of_another_shape_is_refused(tmp_path, base, what):
    get_peft_model(build("llama"), ActConfig(channels={what: [1, 15]}, init_weights=False)).save_pretrained(tmp_path)
    config = ActConfig(channels={what: [1]}, donor=str(tmp_path))
    with pytest.raises(ActLoadError, match=rf"{what}: the donor .* has deltas .*, which do not fit the base's weight"):
        get_peft_model(build("llama", **base), config)


def test_broken_factors_are_refused(tmp_path):
    save_lora("llama", tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[KEY.format("A")][0, 0] = float("nan")
    save_file(tensors, path)
    refused(tmp_path, r"q_proj: the donor's selected weights hold NaN")


def test_a_folder_with_both_is_a_checkpoint(tmp_path):
    save_lora("llama", tmp_path, target_modules=["q_proj"])
    build("llama", seed=0).save_pretrained(tmp_path)
    with pytest.warns(ActWarning, match=f"{tmp_path}: has the same weights as the base in all selected channels"):
        model = get_peft_model(
            build("llama"), ActConfig(channels={"q_proj": [1]}, donor=str(tmp_path), transfer_scale=1.0)
        )
    assert not any(bool(p.any()) for n, p in model.named_parameters() if "act_delta_" in n)


class Hub:
    """A Hub with one repository, of which files appear in the cache as they are asked for."""

    def __init__(self, source, cache):
        self.source, self.asked = source, []
        self.snapshot = cache / "snapshots" / "abc"
        self.snapshot.mkdir(parents=True)

    def snapshot_download(self, repository, *, revision, allow_patterns):
        self.asked.append((repository, revision))
        shutil.copyfile(self.source / "adapter_config.json", self.snapshot / "adapter_config.json")
        return str(self.snapshot)

    def hf_hub_download(self, repository, name, *, revision):
        self.asked.append((repository, revision, name))
        if not (self.source / name).exists():
            raise LocalEntryNotFoundError("no such file")
        shutil.copyfile(self.source / name, self.snapshot / name)


@pytest.mark.parametrize("method", ["lora", "act"])
def test_a_donor_on_the_hub_is_opened_once(tmp_path, monkeypatch, method):
    settings = {"task_type": "CAUSAL_LM"}
    if method == "lora":
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings)
    else:
        config = ActConfig(channels={"q_proj": [1, 2]}, init_weights=False, **settings)
    get_peft_model(build("llama"), config).save_pretrained(tmp_path / "adapter")
    hub = Hub(tmp_path / "adapter", tmp_path / "cache")
    monkeypatch.setattr(locations, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(locations, "hf_hub_download", hub.hf_hub_download)
    model = get_peft_model(build("llama"), ActConfig(channels={"q_proj": [1]}, **settings))
    initialize_from_donor(model, "org/name")
    assert hub.asked == [("org/name", None), ("org/name", "abc", "adapter_model.safetensors")]
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (hub.snapshot / "adapter_model.safetensors").unlink()
    match = (
        r"org/name: adapter_model\.safetensors cannot be downloaded \(no such file\), expected it in the repository"
    )
    with pytest.raises(ActValueError, match=match):
        initialize_from_donor(model, "org/name")
