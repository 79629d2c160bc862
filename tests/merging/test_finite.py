"""Merged values that are not finite: a broken adapter is refused, an overflow is a warning or an error."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from act_peft import ActValueError, ActWarning, merge_checkpoint
from act_peft.cli import main
from tests.support.tiny_checkpoints import change_adapter, save_adapter, save_relatives
from tests.support.tiny_models import state_bytes

HEAD = "base_model.model.lm_head.act_delta_weight"


def set_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.fixture
def folders(tmp_path):
    save_relatives(tmp_path, "llama", dtype=torch.float16)
    save_adapter(tmp_path / "a", dtype=torch.float16, channels={"lm_head": [1, 5], "q_proj": [0]})
    return tmp_path


def in_memory(folders, **settings):
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    return PeftModel.from_pretrained(base, folders / "a").merge_and_unload(**settings)


def test_an_overflow_of_the_checkpoint_s_dtype_is_a_warning_or_refused(folders, capsys):
    change_adapter(folders / "a", HEAD, set_first(7e4))  # finite in float32, not in float16
    with pytest.warns(ActWarning, match=r"lm_head: merged values are not finite: .*\(1 modules"):
        merge_checkpoint(folders / "base", folders / "a", folders / "out")
    merged = AutoModelForCausalLM.from_pretrained(folders / "out")
    assert state_bytes(merged) == state_bytes(in_memory(folders))
    assert merged.lm_head.weight.isinf().sum() == 1
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        in_memory(folders, safe_merge=True)
    with pytest.raises(ActValueError, match="lm_head: merged values are not finite in model"):
        merge_checkpoint(folders / "base", folders / "a", folders / "safe", safe_merge=True)
    arguments = ["merge", "--base", folders / "base", "--adapter", folders / "a", "--output", folders / "safe"]
    assert main([*map(str, arguments), "--safe-merge"]) == 1
    assert "lm_head: merged values are not finite" in capsys.readouterr().err
    assert not (folders / "safe").exists()


def test_with_finite_values_it_is_the_same(folders):
    merge_checkpoint(folders / "base", folders / "a", folders / "out", safe_merge=True)
    assert state_bytes(AutoModelForCausalLM.from_pretrained(folders / "out")) == state_bytes(in_memory(folders))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_broken_adapter_is_refused(folders, value):
    change_adapter(folders / "a", HEAD, set_first(value))
    with pytest.raises(ActValueError, match=r"lm_head: the deltas of .*a times their weight -2 hold NaN or infinity"):
        merge_checkpoint(folders / "base", folders / "a", folders / "out", weights=[-2.0])
    assert not (folders / "out").exists()


def test_a_base_that_is_not_finite_itself_is_no_fault_of_the_adapter(folders):
    path = next(f for f in (folders / "base").glob("*.safetensors") if "lm_head.weight" in load_file(f))
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")

    start = json.loads(content[8 : 8 + length])["lm_head.weight"]["data_offsets"][0] + 8 + length
    content[start + 2 * 16 : start + 2 * 16 + 2] = b"\x00\x7e"  # NaN in row 1
    path.write_bytes(content)
    with pytest.warns(ActWarning) as seen:
        merge_checkpoint(folders / "base", folders / "a", folders / "out")
    assert any("lm_head: merged values are not finite" in str(one.message) for one in seen)
