"""The LoRA twin of a saved adapter: what programs that never import act_peft load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from act_peft import ActConfig, ActTypeError, ActValueError, ActWarning, merge_checkpoint
from tests.support.exports import TOLERANCES, adapted, config_of, layers_of
from tests.support.tiny_models import batch, build

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
STOCK = """
import sys, torch, transformers
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    save_file({"logits": model(load_file("ids.safetensors")["ids"]).logits}, "logits.safetensors")
assert "act_peft" not in sys.modules
"""


@pytest.fixture
def model(tmp_path):
    build("qwen2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    return adapted(base, channels={"q_proj": [0, 3], "up_proj": [1], "norm": [2]}, biases=True)


def load(tmp_path, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()


def test_a_program_without_act_peft_loads_it(model, tmp_path):
    model.save_pretrained(tmp_path / "act", lora_twin=True)
    save_file({"ids": batch()}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOCK, str(tmp_path / "act" / "lora")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, model(batch()).logits, **TOLERANCES[torch.float32])


def test_our_own_loading_does_not_look_at_it(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "act", lora_twin=True)
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "act")]
    assert adapters[0] == adapters[1]
    (tmp_path / "act" / "lora" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert torch.equal(load(tmp_path, tmp_path / "act")(batch()).logits, model(batch()).logits)
    merge_checkpoint(tmp_path / "base", tmp_path / "act", tmp_path / "merged")


def test_an_adapter_with_a_twin_keeps_it(model, tmp_path):
    model.save_pretrained(tmp_path / "act", lora_twin=True)
    assert config_of(tmp_path / "act")["lora_twin"] is True
    again = load(tmp_path, tmp_path / "act")
    for layer in layers_of(again).values():
        layer.act_delta_weight["default"].data.mul_(2)
    again.save_pretrained(tmp_path / "act")
    torch.testing.assert_close(
        load(tmp_path, tmp_path / "act" / "lora")(batch()).logits,
        load(tmp_path, tmp_path / "act")(batch()).logits,
        **TOLERANCES[torch.float32],
    )
    again.save_pretrained(tmp_path / "act", lora_twin=False)
    assert not (tmp_path / "act" / "lora").exists()


def test_a_folder_of_this_name_that_is_no_twin_stays(model, tmp_path):
    model.save_pretrained(tmp_path / "act")
    (tmp_path / "act" / "lora").mkdir()
    (tmp_path / "act" / "lora" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "act")
    assert (tmp_path / "act" / "lora" / "README.md").read_text() == "mine"


def test_push_to_hub_takes_it_along_with_our_card(model, tmp_path, monkeypatch):
    model.peft_config["default"].lora_twin = True
    pushed = {}

    def upload(self, folder, repo_id, **_):
        shutil.copytree(folder, tmp_path / "pushed")
        pushed["to"] = repo_id

    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    repository = type("Repository", (), {"repo_id": "me/ability"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: repository)
    monkeypatch.setattr("transformers.utils.hub.create_repo", lambda *_, **__: repository, raising=False)  # up to 5.6
    monkeypatch.setattr("huggingface_hub.ModelCard.load", no_card_yet)
    model.push_to_hub("me/ability")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "## ACT adapter" in card
    assert 'subfolder="lora"' in card
    assert "library_name: peft" in card
    assert "[More Information Needed]" not in card
    assert "transformers model" not in card
    assert pushed == {"to": "me/ability"}
    assert sorted(path.name for path in (tmp_path / "pushed" / "lora").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


LOAD = ModelCard.load


def no_card_yet(where, *args, **settings):
    """The Hub's answer for a new repository; cards of folders are read as always."""
    if os.path.exists(where):
        return LOAD(where, *args, **settings)
    raise LocalEntryNotFoundError("no README.md")


def test_every_adapter_has_its_own(model, tmp_path):
    model.add_adapter("second", ActConfig(channels={"up_proj": [0, 5]}, init_weights=False, lora_twin=True))
    model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both" / "lora").exists()
    twin = load(tmp_path, tmp_path / "both" / "lora-second")
    model.set_adapter("second")
    torch.testing.assert_close(twin(batch()).logits, model(batch()).logits, **TOLERANCES[torch.float32])


def test_an_adapter_in_the_place_of_a_twin_is_refused_before_anything_is_written(model, tmp_path):
    model.add_adapter("lora", ActConfig(channels={"up_proj": [0]}))
    with pytest.raises(
        ActValueError, match="lora_twin: got an adapter named 'lora', which is saved in the folder of "
    ):
        model.save_pretrained(tmp_path / "act", lora_twin=True)
    assert not (tmp_path / "act").exists()
    model.save_pretrained(tmp_path / "act", lora_twin=False)


def test_an_adapter_without_a_lora_form_is_saved_all_the_same(tmp_path):
    model = adapted(build("qwen2"), channels={"norm": [2]}, biases=True)
    with pytest.warns(ActWarning, match="the adapter is saved, its LoRA twin is not: .*no module is left for LoRA"):
        model.save_pretrained(tmp_path / "act", lora_twin=True)
    assert sorted(path.name for path in (tmp_path / "act").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_it_is_yes_or_no(model, tmp_path):
    with pytest.raises(ActTypeError, match="lora_twin: got 'yes', expected True or False"):
        model.save_pretrained(tmp_path / "act", lora_twin="yes")
    with pytest.raises(ActTypeError, match="lora_twin: got 1, expected True or False"):
        ActConfig(lora_twin=1)
    model.save_pretrained(tmp_path / "act", lora_twin=True, is_main_process=False)
    assert not (tmp_path / "act" / "lora").exists()


def test_the_card_of_a_push_and_of_a_folder_say_so(model, tmp_path):
    model.save_pretrained(tmp_path / "act", lora_twin=True)
    card = (tmp_path / "act" / "README.md").read_text()
    assert 'subfolder="lora"' in card
    assert json.loads((tmp_path / "act" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    get_peft_model(build("llama"), ActConfig(channels={"q_proj": [1]})).save_pretrained(tmp_path / "plain")
    assert "act-peft export-lora" in (tmp_path / "plain" / "README.md").read_text()
