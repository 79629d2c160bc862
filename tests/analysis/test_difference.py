"""The difference between checkpoints on disk, against the models in memory."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from act_peft.analysis import compare_checkpoints
from act_peft.demo.family import BASE, DONOR

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(folder, seed=0, *, change=None, **settings):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": 40, **SHAPE, **settings}))
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    return model


def compare(one, other):
    return compare_checkpoints(one, other, show_progress=False)


def test_against_the_models_in_memory():
    found = compare(BASE, DONOR)
    models = [AutoModelForCausalLM.from_pretrained(path).requires_grad_(False) for path in (BASE, DONOR)]
    base, donor = (dict(model.named_parameters()) for model in models)
    squares = {name: float((donor[name].double() - base[name].double()).square().sum()) for name in base}
    norms = {name: float(base[name].double().square().sum()) for name in base}
    assert found.whole.parameters == len(base)
    assert found.whole.values == sum(values.numel() for values in base.values())
    assert found.whole.relative == pytest.approx(math.sqrt(sum(squares.values()) / sum(norms.values())))
    up = [name for name in base if name.endswith("up_proj.weight")]
    assert found.kinds["up_proj"].relative == pytest.approx(
        math.sqrt(sum(squares[n] for n in up) / sum(norms[n] for n in up))
    )
    assert sum(group.values for group in found.layers.values()) == found.whole.values
    flat = [torch.cat([m[n].double().flatten() for n in base if m[n].dim() == 2]) for m in (base, donor)]
    assert found.matrices.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))
    assert found.verdict.startswith("they look like relatives (cosine of the weights 0.9")
    assert found.records()[0]["changed"] == f"{len(base)} of {len(base)}"


def test_what_changed_is_named(tmp_path):
    save(tmp_path / "base")
    save(tmp_path / "donor", change=lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.5))
    found = compare(tmp_path / "base", tmp_path / "donor")
    assert found.whole.changed == 1
    assert next(iter(found.kinds)) == "up_proj"
    assert found.kinds["up_proj"].relative == pytest.approx(0.5 / math.sqrt(2), rel=0.2)
    assert [name for name, group in found.layers.items() if group.changed] == ["layer 1"]
    assert found.notes == ("input and output embeddings: not tied",)
    assert "1 of 21 parameters differ" in found.title
    same = compare(tmp_path / "base", tmp_path / "base")
    assert same.verdict == "all parameters that both have are equal: it is the same model"


def test_other_settings_and_tokens(tmp_path):
    save(tmp_path / "base", tie_word_embeddings=True)
    grown = {"vocab_size": 44, "tie_word_embeddings": False, "max_position_embeddings": 64}
    save(tmp_path / "donor", rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **grown)
    found = compare(tmp_path / "base", tmp_path / "donor")
    text = "\n".join(found.notes)
    for line in (
        "rope_theta: 10000.0 in the base, 500000.0 in the donor",
        "max_position_embeddings: 2048 in the base, 64 in the donor",
        "tokens: the donor has 4 more (44)",
        "input and output embeddings: tied in the base, not tied in the donor",
    ):
        assert line in text
    assert found.kinds["embed_tokens"].values == 40 * 16  # the common rows
    assert found.kinds["lm_head"].values == 40 * 16


def test_tied_parameters_count_once(tmp_path):
    save(tmp_path / "base", tie_word_embeddings=True)
    found = compare(tmp_path / "base", tmp_path / "base")
    assert "lm_head" not in found.kinds
    assert found.only_base == found.only_donor == ()


def test_strangers(tmp_path):
    save(tmp_path / "base")
    save(tmp_path / "other", seed=1)
    assert compare(tmp_path / "base", tmp_path / "other").verdict.startswith("they do not look like relatives (cosine")
    save(tmp_path / "wide", intermediate_size=32, num_hidden_layers=3)
    found = compare(tmp_path / "base", tmp_path / "wide")
    assert "model.layers.0.mlp.up_proj.weight" in found.only_base
    assert any(name.startswith("model.layers.2.") for name in found.only_donor)
    assert any(note.startswith("only in the donor, or of a different shape: model.layers.2") for note in found.notes)
    assert any(note.startswith("intermediate_size: 24 in the base, 32 in the donor") for note in found.notes)


def test_rows_in_blocks_give_the_same(monkeypatch):
    from act_peft.analysis import difference

    whole = compare(BASE, DONOR)
    monkeypatch.setattr(difference, "_ELEMENTS", 1000)
    parts = compare(BASE, DONOR)
    assert parts.whole.squares == pytest.approx(whole.whole.squares)
    assert parts.whole.changed == whole.whole.changed
