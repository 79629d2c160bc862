"""Adapters side by side: what must agree before they are combined."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from act_peft import ActConfig, ActLoadError, ActValueError
from act_peft.adapter.changes import changes_in_folder
from act_peft.adapter.file import AdapterFolder
from act_peft.combination.union import Source, union_modules
from tests.support.tiny_checkpoints import save_adapter
from tests.support.tiny_models import build


def source(folder, name):
    with AdapterFolder(folder) as adapter:
        return Source(name, changes_in_folder(adapter, None), 1.0)


def save(folder, channels, family="llama", **changes):
    config = ActConfig(channels=channels, init_weights=False)
    get_peft_model(build(family, **changes), config).save_pretrained(folder)
    return source(folder, folder.name)


def test_union_of_modules_and_channels(tmp_path):
    a = save(tmp_path / "a", {"layers.0.mlp.up_proj": [3, 5], "embed_tokens": [1]})
    b = save(tmp_path / "b", {"layers.0.mlp.up_proj": [0, 5], "norm": [2]})
    union = {module.name: module for module in union_modules([a, b])}
    assert list(union) == sorted(union)
    assert union["model.layers.0.mlp.up_proj"].index.tolist() == [0, 3, 5]
    assert union["model.layers.0.mlp.up_proj"].shapes() == {"weight": (3, 16)}
    assert union["model.embed_tokens"].shapes() == {"weight": (48, 1)}
    assert union["model.norm"].shapes() == {"weight": (1,)}
    assert [change is None for change in union["model.norm"].changes] == [True, False]
    assert union["model.norm"].dtype == torch.float32


def test_a_module_inside_another_keeps_its_place(tmp_path):
    save_adapter(tmp_path / "a", "gpt2")
    names = [module.name for module in union_modules([source(tmp_path / "a", "a")])]
    keys = [f"{name}.act_delta_" for name in names]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (("llama", {"intermediate_size": 32}), r"up_proj: b changes a linear of 32 channels, width 16, .* a .* of 24"),
        (("llama", {"hidden_size": 32}), "up_proj: b changes a linear of 24 channels, width 32"),
        (("llama", {"mlp_bias": True}), "up_proj: b changes .*, a bias, a a linear .*, no bias; expected adapters of"),
    ],
)
def test_adapters_that_disagree_are_refused(tmp_path, other, match):
    family, changes = other
    a = save(tmp_path / "a", {"up_proj": [3, 5]})
    b = save(tmp_path / "b", {"up_proj": [3, 5]}, family, **changes)
    with pytest.raises(ActLoadError, match=match):
        union_modules([a, b])


def test_adapters_without_channels_are_refused(tmp_path):
    a = save(tmp_path / "a", {"up_proj": [3, 5]})
    a.changes.modules.clear()
    with pytest.raises(ActValueError, match="adapters: got no channel in any of them"):
        union_modules([a])
