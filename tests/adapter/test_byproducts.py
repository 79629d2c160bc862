"""Adapters with whole embeddings, saved modules and rows of tokens: combined, exported, shown, as donor."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from act_peft import ActLoadError, ActValueError, combine, create_adapter, export_lora, find_conflicts
from act_peft.cli import main
from tests.support.byproducts import CASES, QUIET, load_base, save_case
from tests.support.tiny_checkpoints import change_adapter
from tests.support.tiny_models import batch

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
DELTAS_ONLY = [
    name for name, (settings, *_) in CASES.items() if not {"modules_to_save", "trainable_token_indices"} & {*settings}
]


@pytest.mark.parametrize("case", CASES)
def test_the_export_is_the_adapter(case, tmp_path):
    model = save_case(tmp_path, case)
    export_lora(tmp_path / "a", tmp_path / "lora")
    lora = PeftModel.from_pretrained(load_base(tmp_path / "base", resized=CASES[case][2]), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(batch()).logits, model(batch()).logits)


@pytest.mark.parametrize("case", DELTAS_ONLY)
def test_combined_it_brings_the_embeddings_along(case, tmp_path):
    model = save_case(tmp_path, case)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "both", weights=[0.5, 0.5])
    base = load_base(tmp_path / "base", resized=CASES[case][2])
    combined = PeftModel.from_pretrained(base, tmp_path / "both").eval()
    assert torch.equal(combined(batch()).logits, model(batch()).logits)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "both")]
    assert tensors[0].keys() == tensors[1].keys()
    changed = next(key for key in tensors[0] if "act_delta" not in key)
    change_adapter(tmp_path / "b", changed, lambda t: t + 1)
    with pytest.raises(ActLoadError, match=r"hold different tensors of the base, .*save_embedding_layers=False"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "other")


def test_a_wide_embedding_is_combined_too(tmp_path):
    save_case(tmp_path, "named embeddings", dtype=torch.float64)
    combine([tmp_path / "a"], tmp_path / "one")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "one")]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


@pytest.mark.parametrize("case", ["head", "tokens"])
def test_what_was_trained_without_deltas_is_not_combined(case, tmp_path):
    save_case(tmp_path, case)
    for step in (lambda: combine([tmp_path / "a"], tmp_path / "out"), lambda: find_conflicts([tmp_path / "a"])):
        with pytest.raises(ActValueError, match=r"expected channel deltas only .*merge_checkpoint"):
            step()


def test_as_donor_it_is_refused_where_more_than_deltas_is_asked_for(tmp_path):
    save_case(tmp_path, "head")
    mask, other = {"q_proj": [0, 2]}, {"lm_head": [0]}
    create_adapter(tmp_path / "base", tmp_path / "a", mask, tmp_path / "rows", transfer_scale=1.0)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("rows", "a")]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    with pytest.raises(ActLoadError, match=r"lm_head.weight: the donor .* holds the whole tensor"):
        create_adapter(tmp_path / "base", tmp_path / "a", other, tmp_path / "out")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "base")
    save_case(tmp_path, "tokens")
    with pytest.raises(ActValueError, match=r"has rows of tokens .*merge the donor with merge_checkpoint"):
        create_adapter(tmp_path / "base", tmp_path / "a", mask, tmp_path / "out")


def test_whole_tensors_that_equal_the_base_s_are_no_obstacle_to_a_donor(tmp_path):
    save_case(tmp_path, "named embeddings")
    create_adapter(tmp_path / "base", tmp_path / "a", {"embed_tokens": [2, 5]}, tmp_path / "rows", transfer_scale=1.0)
    key = "base_model.model.model.embed_tokens.act_delta_weight"
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("rows", "a")]
    assert torch.equal(tensors[0][key], tensors[1][key])


def test_they_are_shown(tmp_path, capsys):
    for case, key, shown in (
        ("head", "saved_as_a_whole", ["lm_head.weight"]),
        ("tokens, resized", "tokens", {"model.embed_tokens": [10, 52]}),
        ("resized, tied", "tensors_of_the_base", ["lm_head.weight", "model.embed_tokens.weight"]),
    ):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        save_case(tmp_path, case)
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[key] == shown
