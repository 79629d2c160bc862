"""Where parameters lie: renamed keys, parts of tensors, ties, keys that nobody reads, operations that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading as loading

from act_peft import ActValueError
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.layout import Layout
from act_peft.disk.rules import WeightConverter
from act_peft.disk.skeleton import layout_of
from tests.support.architecture_settings import ENCODER, TEXT, VISION
from tests.support.architectures import by_name
from tests.support.versions import skip_as_older

FUSED = (transformers.NomicBertForMaskedLM, transformers.NomicBertConfig(**ENCODER))
SWIGLU = (
    transformers.Dinov2ForImageClassification,
    transformers.Dinov2Config(**VISION, use_swiglu_ffn=True),
)


def saved(folder, model_class, config, **settings):
    model = model_class(config)
    model.save_pretrained(folder, **settings)
    return model_class.from_pretrained(folder)


@pytest.mark.parametrize(("model_class", "config"), [FUSED, SWIGLU])
@pytest.mark.parametrize("original", [True, False])
def test_a_part_of_a_fused_tensor_is_a_parameter(tmp_path, model_class, config, original):
    model = saved(tmp_path, model_class, config, save_original_format=original)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with Checkpoint.open(tmp_path) as checkpoint:
        keys = CheckpointKeys(checkpoint, list(parameters))
        parts = [name for name in parameters if keys.place(name).key is None]
        if original and not parts:
            skip_as_older("transformers", "stores the parts as they are")
        assert bool(parts) == original
        for name, parameter in parameters.items():
            assert keys.shape(name) == tuple(parameter.shape)
            index = torch.arange(0, len(parameter), 3)
            assert torch.equal(keys.rows(name, index), parameter[index])
            if parameter.dim() == 2:
                columns = torch.arange(1, parameter.shape[1], 5)
                assert torch.equal(keys.rows(name, columns, 1), parameter[:, columns])


@pytest.mark.parametrize("what", ["interleaved", "joined"])
def test_rows_may_be_anywhere(tmp_path, monkeypatch, what):
    if what == "interleaved" and not hasattr(loading, "Interleave"):
        skip_as_older("transformers", "has no such operation")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 4}))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    prefix = "model.layers.0.mlp."
    if what == "interleaved":
        gate, up = (state.pop(f"{prefix}{part}_proj.weight") for part in ("gate", "up"))
        state[f"{prefix}w13.weight"] = torch.stack([gate, up], 1).flatten(0, 1).contiguous()
        rule = WeightConverter(
            "mlp.w13.weight",
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            [loading.Interleave(dim=0), loading.Chunk(dim=0)],
        )
    else:
        first, second = state.pop(f"{prefix}gate_proj.weight").split([20, 28])
        state |= {f"{prefix}one.weight": first.contiguous(), f"{prefix}two.weight": second.contiguous()}
        rule = WeightConverter(
            ["mlp.one.weight", "mlp.two.weight"], "mlp.gate_proj.weight", [loading.Concatenate(dim=0)]
        )
    monkeypatch.setattr("act_peft.disk.layout.get_model_conversion_mapping", lambda model: [copy.deepcopy(rule)])
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        keys = CheckpointKeys(checkpoint, [])
        for part in ("gate", "up"):
            name = f"{prefix}{part}_proj.weight"
            expected = model.get_parameter(name)
            for index in (torch.tensor([1, 19, 20, 47]), torch.arange(48), torch.tensor([25])):
                assert torch.equal(keys.rows(name, index), expected[index])
            assert torch.equal(keys.rows(name, torch.tensor([3, 7]), 1), expected[:, [3, 7]])


def test_what_is_more_than_rows_is_refused(tmp_path):
    saved(tmp_path, transformers.MixtralForCausalLM, transformers.MixtralConfig(**TEXT, num_local_experts=4))
    with Checkpoint.open(tmp_path) as checkpoint:
        layout = layout_of(checkpoint)
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert layout.has(name)
        assert layout.shape(name) == (4, 96, 32)
        with pytest.raises(ActValueError, match=r"gate_up_proj is made of 8 tensors .*MergeModulelist\(dim=0\), Conc"):
            layout.place(name)


def test_keys_that_the_class_ignores_are_no_parameters(tmp_path):
    model = saved(tmp_path, transformers.LlamaForCausalLM, transformers.LlamaConfig(**TEXT))
    extra = {"model.layers.61.eh_proj.weight": torch.ones(2, 2), "rotary.inv_freq": torch.ones(2)}
    save_file({**load_file(tmp_path / "model.safetensors"), **extra}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        layout = layout_of(checkpoint)
        assert set(layout.unread) == set(extra)
        assert set(layout.stored) == set(dict(model.named_parameters()))
        keys = CheckpointKeys(checkpoint, list(layout.stored))
        assert set(keys.surplus) == set(layout.stored)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (
            "T5ForConditionalGeneration",
            [{"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}],
        ),
        (
            "BertForMaskedLM",
            [
                {"cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"},
                {"cls.predictions.decoder.bias", "cls.predictions.bias"},
            ],
        ),
        ("Qwen3VLForConditionalGeneration", [{"lm_head.weight", "model.language_model.embed_tokens.weight"}]),
        ("LlamaForCausalLM", []),
    ],
)
def test_ties_are_asked_of_the_class(tmp_path, name, groups):
    by_name(name).build(0).save_pretrained(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        layout: Layout = layout_of(checkpoint)
        assert [set(group) for group in layout.groups] == groups
        for group in groups:
            assert len({layout.holder(member) for member in group}) == 1


def test_new_keys_are_in_the_style_of_the_checkpoint(tmp_path):
    saved(tmp_path, transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**ENCODER, tie_word_embeddings=True))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("embed_out.weight", None)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert layout_of(checkpoint).new_key("lm_head.weight") in ("embed_out.weight", "lm_head.weight")
