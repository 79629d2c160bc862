"""Names on disk are not names of modules: old and new files, several towers, ignored layers, renamed adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Chunk, WeightConverter

from act_peft import (
    ActConfig,
    ActValueError,
    combine,
    create_adapter,
    export_lora,
    initialize_from_donor,
    merge_checkpoint,
)
from tests.support.architecture_settings import TEXT
from tests.support.architectures import by_name
from tests.support.tiny_checkpoints import change_adapter
from tests.support.versions import skip_as_older
from tests.test_architectures import adapter, equal, relatives, selected

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# ---------------------------------------------------------------------------------------------- files, old and new ---

LEGACY = {  # names of transformers 4 that its versions 5 still read, beside those of the architecture
    "BertForMaskedLM": [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")],
}


def write(model, folder, *, old: bool) -> None:
    """Write a model under the names of transformers 4 or 5."""
    model.save_pretrained(folder, save_original_format=old)
    if old:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for new_name, old_name in LEGACY.get(type(model).__name__, ()):
            tensors = {key.replace(new_name, old_name): tensor for key, tensor in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})


OLD_NAMES = ["LlavaForConditionalGeneration", "MixtralForCausalLM", "GPTNeoXForCausalLM", "ViTForImageClassification"]


@pytest.mark.parametrize("name", [*OLD_NAMES, "BertForMaskedLM", "NomicBertForMaskedLM"])
def test_old_and_new_files_work_as_base_and_as_donor(tmp_path, name):
    architecture = by_name(name)
    base, donor = relatives(architecture)
    for old in (True, False):
        write(base, tmp_path / f"base{old:d}", old=old)
        write(donor, tmp_path / f"donor{old:d}", old=old)
    keys = [load_file(tmp_path / f"base{old}" / "model.safetensors").keys() for old in (0, 1)]
    if keys[0] == keys[1]:
        skip_as_older("transformers", "renames nothing here")
    mask = selected(base, architecture, 0.3)
    made = []
    for old_base, old_donor in ((0, 0), (0, 1), (1, 0), (1, 1)):
        out = tmp_path / f"adapter{old_base}{old_donor}"
        create_adapter(tmp_path / f"base{old_base}", tmp_path / f"donor{old_donor}", mask, out)
        made.append((out / "adapter_model.safetensors").read_bytes())
    assert made.count(made[0]) == 4
    merged = []
    for old in (0, 1):
        merge_checkpoint(tmp_path / f"base{old}", tmp_path / "adapter00", tmp_path / f"merged{old}")
        merged.append(architecture.model_class.from_pretrained(tmp_path / f"merged{old}"))
    equal(*merged)


@pytest.mark.parametrize(
    ("channels", "refused"),
    [
        (
            {"position_embeddings": [1]},
            r"its channels are columns, and its weight is a part of bert\.embeddings\.both",
        ),
        ({"predictions.decoder": [1]}, r"predictions\.decoder\.weight shares rows of bert\.embeddings\.both"),
    ],
)
def test_parts_of_tensors_that_cannot_be_merged_are_refused(tmp_path, monkeypatch, channels, refused):
    architecture = by_name("BertForMaskedLM")
    base, donor = relatives(architecture)
    embeddings = ["word_embeddings.weight", "position_embeddings.weight"]
    rule = WeightConverter("embeddings.both.weight", [f"embeddings.{name}" for name in embeddings], [Chunk(dim=0)])
    monkeypatch.setattr("act_peft.disk.layout.get_model_conversion_mapping", lambda model: [copy.deepcopy(rule)])
    for name, model in (("base", base), ("donor", donor)):
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        parts = [tensors.pop(f"bert.embeddings.{part}") for part in embeddings]
        save_file({**tensors, "bert.embeddings.both.weight": torch.cat(parts)}, path, metadata={"format": "pt"})
    create_adapter(tmp_path / "base", tmp_path / "donor", channels, tmp_path / "adapter", transfer_scale=1.0)
    made = adapter(tmp_path / "adapter")
    [delta] = [tensor for key, tensor in made.items() if key.endswith("act_delta_weight")]
    [name] = channels
    mine, theirs = (next(m for n, m in model.named_modules() if n.endswith(name)).weight for model in (base, donor))
    expected = (theirs - mine).detach()
    assert torch.equal(delta, expected[:, 1:2] if name == "position_embeddings" else expected[1:2])
    with pytest.raises(ActValueError, match=refused):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["word_embeddings"]}))
    whole = base.get_input_embeddings().weight.detach()
    change_adapter(tmp_path / "adapter", "base_model.model.bert.embeddings.word_embeddings.weight", lambda _: whole)
    with pytest.raises(ActValueError, match=r"is a part of bert\.embeddings\.both.*, expected a tensor of its own"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------------ two towers ---


@pytest.fixture
def towers(tmp_path):
    """A text adapter; `both`, a checkpoint with the text model and a second one of the same names; a donor like it."""
    architecture = by_name("LlamaForCausalLM")
    text, donor = relatives(architecture)
    text.save_pretrained(tmp_path / "text")
    donor.save_pretrained(tmp_path / "donor")
    channels = {"self_attn.q_proj": [0, 4], "self_attn.v_proj": [1]}
    create_adapter(tmp_path / "text", tmp_path / "donor", channels, tmp_path / "adapter")
    return tmp_path


def write_both(folder, name, *, second, config=None, first="model.language_model.", other="model.audio_tower."):
    tensors = load_file(folder / "text" / "model.safetensors")
    both = {k.replace("model.", first, 1): v for k, v in tensors.items()}
    both |= {k.replace("model.", other, 1): second(v) for k, v in tensors.items() if ".layers." in k}
    (folder / name).mkdir()
    save_file(both, folder / name / "model.safetensors", metadata={"format": "pt"})
    settings = {"model_type": "llama", "tie_word_embeddings": False} if config is None else config
    (folder / name / "config.json").write_text(json.dumps(settings))


def changed(folder, name):
    before, after = (load_file(folder / part / "model.safetensors") for part in (name, "merged"))
    return sorted({key.split(".layers.")[0] for key in before if not torch.equal(before[key], after[key])})


def forget_fingerprints(folder):
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for entry in config["adapted_modules"].values():
        entry["base"] = None
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("text_first", [True, False])
def test_recorded_fingerprints_choose_the_tower(towers, text_first):
    prefixes = {} if text_first else {"first": "model.z_language.", "other": "model.a_tower."}
    write_both(towers, "both", second=torch.randn_like, **prefixes)
    merge_checkpoint(towers / "both", towers / "adapter", towers / "merged")
    assert changed(towers, "both") == ["model.language_model" if text_first else "model.z_language"]


def test_shapes_choose_the_tower(towers):
    forget_fingerprints(towers)
    write_both(towers, "both", second=lambda tensor: torch.cat([tensor, tensor]))
    merge_checkpoint(towers / "both", towers / "adapter", towers / "merged")
    assert changed(towers, "both") == ["model.language_model"]


def test_without_them_the_candidates_are_named(towers):
    forget_fingerprints(towers)
    write_both(towers, "both", second=torch.randn_like)
    candidates = (
        r"model\.layers\.\d\.self_attn\.[qv]_proj\.weight may be model\.audio_tower\.layers\..*, "
        r"model\.language_model\.layers\..*, expected a single one"
    )
    with pytest.raises(ActValueError, match=candidates):
        merge_checkpoint(towers / "both", towers / "adapter", towers / "merged")
    with pytest.raises(ActValueError, match=candidates):
        combine([towers / "adapter"], towers / "merged", base=towers / "both")
    assert not (towers / "merged").exists()


def test_combining_and_exporting_choose_the_tower_too(towers):
    write_both(towers, "both", second=torch.randn_like)
    combine([towers / "adapter"], towers / "combined", base=towers / "both")
    entries = [
        json.loads((towers / part / "adapter_config.json").read_text())["adapted_modules"]
        for part in ("adapter", "combined")
    ]
    assert entries[0] == entries[1]
    donor = load_file(towers / "donor" / "model.safetensors")
    channels = {"input_layernorm": [1, 2], "self_attn.q_proj": [0]}
    create_adapter(towers / "text", towers / "donor", channels, towers / "norms", transfer_scale=1.0)
    export_lora(towers / "norms", towers / "lora", biases="modules_to_save", base=towers / "both")
    lora = adapter(towers / "lora")
    name = "model.layers.1.input_layernorm.weight"
    saved = next(tensor for key, tensor in lora.items() if key.endswith(name))
    torch.testing.assert_close(saved[1:3], donor[name][1:3])


def test_the_configuration_chooses_the_tower_of_a_donor(towers, tmp_path):
    """The layers of both towers have the same names and, up to the first block, the same shapes."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        image_token_index=60,
    )
    wrapped = transformers.LlavaForConditionalGeneration(config)
    text = transformers.LlamaForCausalLM.from_pretrained(towers / "text")
    wrapped.model.language_model.load_state_dict(text.model.state_dict())
    wrapped.lm_head.load_state_dict(text.lm_head.state_dict())
    wrapped.save_pretrained(tmp_path / "wrapped")
    channels = {"self_attn.q_proj": [0, 4], "norm": [1]}
    create_adapter(towers / "donor", tmp_path / "wrapped", channels, tmp_path / "from_wrapped")
    create_adapter(towers / "donor", towers / "text", channels, tmp_path / "from_text")
    mine, theirs = adapter(tmp_path / "from_wrapped"), adapter(tmp_path / "from_text")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


# ---------------------------------------------------------------------------------------------------- other names ---


def test_layers_that_the_class_ignores_do_not_count(tmp_path):
    architecture = by_name("DeepseekV3ForCausalLM")
    base, donor = relatives(architecture)
    for name, model in (("base", base), ("donor", donor)):
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        more = {"model.layers.61.eh_proj.weight": torch.ones(2, 4), "model.layers.61.norm.weight": torch.ones(2)}
        save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    settings = ActConfig(channels={"o_proj": [1, 2]}, donor=str(tmp_path / "donor"))
    model = get_peft_model(architecture.model_class.from_pretrained(tmp_path / "base"), settings)
    model.save_pretrained(tmp_path / "memory")
    create_adapter(tmp_path / "base", tmp_path / "donor", {"o_proj": [1, 2]}, tmp_path / "made")
    assert all(
        torch.equal(tensor, adapter(tmp_path / "made")[key]) for key, tensor in adapter(tmp_path / "memory").items()
    )
    merge_checkpoint(tmp_path / "base", tmp_path / "made", tmp_path / "merged")
    assert "model.layers.61.eh_proj.weight" in load_file(tmp_path / "merged" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForCausalLM", TaskType.CAUSAL_LM),
        ("LlavaForConditionalGeneration", TaskType.CAUSAL_LM),
        ("T5ForConditionalGeneration", TaskType.SEQ_2_SEQ_LM),
        ("BertForMaskedLM", None),
        ("WhisperForConditionalGeneration", None),
    ],
)
def test_an_adapter_from_files_names_the_task_of_its_model(tmp_path, name, task):
    architecture = by_name(name)
    for part, model in zip(("base", "donor"), relatives(architecture), strict=True):
        model.save_pretrained(tmp_path / part)
    mask = selected(architecture.build(0), architecture, 0.1)
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "made")
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert config["task_type"] == (None if task is None else task.value)
    PeftModel.from_pretrained(architecture.model_class.from_pretrained(tmp_path / "base"), tmp_path / "made")


def rename_adapter(folder, new, old):
    """Let a saved adapter look as if its model had had other names then."""
    tensors = {key.replace(new, old): tensor.clone() for key, tensor in adapter(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["adapted_modules"] = {k.replace(new, old): v for k, v in config["adapted_modules"].items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "new", "old", "channels"),
    [
        ("LlamaForCausalLM", "model.layers", "decoder.layers", {"q_proj": [0, 4], "norm": [1]}),
        ("LlavaForConditionalGeneration", "model.language_model.", "language_model.model.", {"k_proj": [0, 4]}),
        ("ViTForImageClassification", "attention.q_proj", "attention.attention.query", {"q_proj": [3]}),
    ],
)
def test_an_adapter_loads_under_a_key_mapping(tmp_path, name, new, old, channels):
    architecture = by_name(name)
    base, donor = relatives(architecture)
    if not any(new in f"{module}." for module, _ in base.named_modules()):
        skip_as_older("transformers", "still has the old names")
    model = get_peft_model(base, ActConfig(channels=channels))
    initialize_from_donor(model, donor)
    model.save_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in adapter(tmp_path).items()}  # the file is written anew
    rename_adapter(tmp_path, new, old)
    loaded = PeftModel.from_pretrained(architecture.build(0), tmp_path, key_mapping={old.replace(".", r"\."): new})
    loaded.save_pretrained(tmp_path / "again")
    after = adapter(tmp_path / "again")
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    with pytest.raises(ActValueError, match=r"this name, the model does not .*take key_mapping=\{old: new\}"):
        PeftModel.from_pretrained(architecture.build(0), tmp_path)


def test_a_checkpoint_that_loads_only_with_a_key_mapping_is_refused_with_the_way_out(tmp_path):
    architecture = by_name("LlamaForCausalLM")
    base, donor = relatives(architecture)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    path = tmp_path / "base" / "model.safetensors"
    renamed = {key.replace("self_attn.q_proj", "attn.query"): tensor for key, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(ActValueError, match=r"q_proj\.weight is missing .* only with key_mapping, load it so"):
        create_adapter(tmp_path / "base", tmp_path / "donor", {"q_proj": [1]}, tmp_path / "out")
    mapping = {r"attn\.query": "self_attn.q_proj"}
    loaded = architecture.model_class.from_pretrained(tmp_path / "base", key_mapping=mapping)
    loaded.save_pretrained(tmp_path / "saved", save_original_format=False)
    create_adapter(tmp_path / "saved", tmp_path / "donor", {"q_proj": [1]}, tmp_path / "out")


def test_trained_tokens_and_channels_of_a_tied_output_layer_are_refused():
    model = by_name("Qwen2ForCausalLM").build(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tokens in ([10, 11], {"embed_tokens": [10, 11]}):
        settings = ActConfig(channels={"q_proj": [0], "lm_head": [3]}, trainable_token_indices=tokens)
        with pytest.raises(ActValueError, match=r"lm_head: has the same weight as model\.embed_tokens, whose tokens"):
            get_peft_model(model, settings)
        assert model.state_dict().keys() == before.keys()
