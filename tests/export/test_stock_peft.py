"""PEFT renames modules of some mixtures of experts: an export is loaded or refused, never loaded in part."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from act_peft import ActConfig, ActValueError, ActWarning, export_lora, fit
from act_peft.channels.kinds import ChannelKind, channel_kind, num_channels
from tests.support.architecture_settings import EXPERTS, TEXT
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.engines import vllm
from tests.support.versions import skip_as_older

MIXED = {**TEXT, **EXPERTS}
DENSE_FIRST = {**MIXED, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXTURES = [one for one in ARCHITECTURES if one.kind == "mixture"] + [
    Architecture("mixture", "Glm4MoeForCausalLM", "Glm4MoeConfig", DENSE_FIRST),
    Architecture("mixture", "Dots1ForCausalLM", "Dots1Config", DENSE_FIRST),
    Architecture("mixture", "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", {**MIXED, "moe_num_experts": 4}),
    Architecture("mixture", "Qwen3NextForCausalLM", "Qwen3NextConfig", {**MIXED, **DELTA}),
]
# Those in which PEFT takes dense and shared layers for experts.
REFUSED = {f"{name}ForCausalLM" for name in ("DeepseekV3", "Glm4Moe", "Dots1", "Ernie4_5_Moe", "Qwen3Next")}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if channel_kind(module) is ChannelKind.LINEAR]


def adapted(model: nn.Module, names: list[str]) -> PeftModel:
    channels = {name: list(range(min(2, num_channels(model.get_submodule(name))))) for name in names}
    config = ActConfig(channels=channels, init_weights=False, include_bias=False)
    return get_peft_model(model, config).eval()


def same_deltas(lora: nn.Module, model: nn.Module, names: list[str]) -> None:
    for name in names:
        theirs, mine = (one.get_base_model().get_submodule(name).get_delta_weight("default") for one in (lora, model))
        torch.testing.assert_close(theirs, mine)


@pytest.mark.parametrize("architecture", [pytest.param(one, id=one.model) for one in MIXTURES])
def test_a_mixture_is_loaded_as_a_whole_or_refused_by_name(architecture, tmp_path):
    if not hasattr(transformers, architecture.model):
        skip_as_older("transformers", f"has no {architecture.model}")
    architecture.build(0).save_pretrained(tmp_path / "base")

    def load():
        return architecture.model_class.from_pretrained(tmp_path / "base").eval()

    names = linear(load())
    for end in sorted({name.rpartition(".")[2] for name in names}):
        mine = [name for name in names if name.endswith(f".{end}") or name == end]
        model = adapted(load(), mine)
        if architecture.model in REFUSED and end in ("gate_proj", "up_proj", "down_proj"):
            with pytest.raises(ActValueError, match=f"^{mine[0]}.*: PEFT cannot load factors of these modules"):
                export_lora(model, tmp_path / end)
            continue
        export_lora(model, tmp_path / end)
        same_deltas(PeftModel.from_pretrained(load(), tmp_path / end), model, mine)
    names = [name for name in names if name != "lm_head"]
    model = adapted(load(), names)
    export_lora(model, tmp_path / "engine", target="vllm")
    for name, change in vllm(tmp_path / "engine").items():
        assert torch.equal(change, model.get_base_model().get_submodule(name).get_delta_weight("default"))


@pytest.fixture
def deepseek(tmp_path):
    (architecture,) = (one for one in ARCHITECTURES if one.model == "DeepseekV3ForCausalLM")
    base = architecture.build(0)
    base.save_pretrained(tmp_path / "base")
    return base


DENSE = "model.layers.0.mlp.gate_proj"


def test_a_folder_is_compared_by_the_configuration_of_its_base(deepseek, tmp_path):
    shared = next(name for name in linear(deepseek) if name.endswith("shared_experts.down_proj"))
    model = adapted(deepseek, [shared, "model.layers.0.self_attn.o_proj"])
    model.save_pretrained(tmp_path / "unknown")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "known")
    with pytest.raises(ActValueError, match=rf"{shared}: PEFT cannot load factors of these modules of a DeepseekV3"):
        export_lora(tmp_path / "known", tmp_path / "lora")
    with pytest.raises(ActValueError, match=shared):
        export_lora(tmp_path / "unknown", tmp_path / "lora", base=tmp_path / "base")
    with pytest.warns(ActWarning, match=r"the base is a mixture of experts and not on this machine.*pass base="):
        export_lora(tmp_path / "unknown", tmp_path / "lora")
    export_lora(tmp_path / "known", tmp_path / "vllm", target="vllm")


def test_what_peft_refuses_itself_is_said_with_its_words(tmp_path):
    (architecture,) = (one for one in ARCHITECTURES if one.model == "MambaForCausalLM")
    from act_peft.export.config import lora_config
    from act_peft.export.stock_peft import check_with_peft

    with torch.device("meta"):
        skeleton = architecture.build(0)
    name = next(name for name in linear(skeleton) if name.endswith("out_proj"))
    shape = skeleton.get_submodule(name).weight.shape
    infos = {f"base_model.model.{name}.lora_A.weight": (torch.float32, (1, shape[1]))}
    infos[f"base_model.model.{name}.lora_B.weight"] = (torch.float32, (shape[0], 1))
    with pytest.raises(ActValueError, match=rf"{name}: PEFT cannot load .*MambaForCausalLM \(.*out_proj"):
        check_with_peft(lora_config({name: 1}, known=[name]), infos, skeleton)


def test_a_model_that_is_no_longer_what_its_configuration_says_is_not_compared(deepseek, tmp_path):
    deepseek.get_submodule("model.layers.0.mlp").gate_proj = nn.Linear(32, 7, bias=False)
    export_lora(adapted(deepseek, [DENSE]), tmp_path / "lora")


def test_a_fitted_transfer_is_compared_too(deepseek, tmp_path):
    donor = dataclasses.replace(next(one for one in ARCHITECTURES if one.model == "DeepseekV3ForCausalLM")).build(1)
    batches = [{"input_ids": torch.arange(3, 12)[None]}]
    fitted = fit(deepseek.eval(), donor.eval(), batches, target_modules=[DENSE, "layers.0.self_attn.o_proj"])
    with pytest.raises(ActValueError, match=f"{DENSE}: PEFT cannot load factors"):
        fitted.to_lora(2, tmp_path / "lora")
    fitted.to_lora(2, tmp_path / "engine", target="vllm")
    assert vllm(tmp_path / "engine").keys() == fitted.modules.keys()
