"""Full donors: another vocabulary, tied or untied embeddings, other prefixes, a head or none."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from act_peft import ActConfig, ActTypeError, ActValueError, ActWarning, create_adapter, initialize_from_donor
from tests.support.tiny_models import VOCABULARY, build, build_relatives, random_mask

MODULES = ["embed_tokens", "lm_head", "up_proj"]


def resized(tokens: int, *, seed: int, **changes: object):
    """A relative with another number of tokens: the common ones nearly the same, the others its own."""
    model = build("llama", **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(tokens)
    return model.eval()


def with_donor(base, donor, **settings):
    config = ActConfig(
        channels=random_mask(base, 0.5), donor=str(donor), transfer_scale=1.0, task_type="CAUSAL_LM", **settings
    )
    return get_peft_model(copy.deepcopy(base), config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("base_tokens", "donor_tokens"), [(VOCABULARY, 53), (53, VOCABULARY), (50, 55), (55, 50)])
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_beyond_the_common_vocabulary_do_not_move(tmp_path, base_tokens, donor_tokens, tied):
    base = resized(base_tokens, seed=1, tie_word_embeddings=tied)
    donor = resized(donor_tokens, seed=2, tie_word_embeddings=tied)
    donor.save_pretrained(tmp_path / "donor")
    common = min(base_tokens, donor_tokens)
    mask = random_mask(base, 0.5)
    beyond = int((mask["lm_head"] >= common).sum())
    assert (beyond > 0) == (base_tokens > donor_tokens)
    with pytest.warns(ActWarning) as caught:
        model = with_donor(base, tmp_path / "donor", target_modules=MODULES)
    message = str(next(w.message for w in caught if "differ" in str(w.message)))
    assert f"vocabulary has {donor_tokens} rows and the base's {base_tokens}" in message
    assert f"the {abs(base_tokens - donor_tokens)} rows beyond the common ones are not transferred" in message
    assert (f"lm_head: {beyond} selected channels beyond the common vocabulary are left out" in message) == (
        beyond > 0
    )
    plain = model.get_base_model()
    kept = mask["lm_head"][mask["lm_head"] < common]
    assert torch.equal(plain.lm_head.act_delta_index["default"], kept)
    expected = donor.lm_head.weight[kept] - base.lm_head.weight[kept]
    assert torch.equal(plain.lm_head.act_delta_weight["default"], expected)
    columns = mask["model.embed_tokens"]
    delta = plain.model.embed_tokens.act_delta_weight["default"]
    mine, theirs = base.model.embed_tokens.weight[:common, columns], donor.model.embed_tokens.weight[:common, columns]
    assert torch.equal(delta[:common], theirs - mine)
    assert torch.equal(delta[common:], torch.zeros(base_tokens - common, columns.numel()))


def test_the_same_on_disk_byte_by_byte(tmp_path):
    base, donor = resized(55, seed=1), resized(50, seed=2)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    with pytest.warns(ActWarning, match="are not transferred"):
        with_donor(base, tmp_path / "donor").save_pretrained(tmp_path / "memory")
    mask = random_mask(base, 0.5)
    beyond = int((mask["lm_head"] >= 50).sum())
    with pytest.warns(
        ActWarning, match=f"lm_head: {beyond} selected channels beyond the common vocabulary are left out"
    ):
        create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "disk", transfer_scale=1.0)
    for name in ("adapter_model.safetensors", "README.md"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


def test_a_module_that_loses_every_channel_is_named(tmp_path):
    resized(50, seed=2).save_pretrained(tmp_path)
    config = ActConfig(channels={"lm_head": [51, 54], "up_proj": [0]}, donor=str(tmp_path))
    with pytest.raises(ActValueError, match=r"lm_head: all 2 selected channels lie beyond the 50 tokens"):
        get_peft_model(resized(55, seed=1), config)


def test_an_existing_adapter_keeps_its_channels_and_gets_zeros_for_unknown_tokens():
    base, donor = resized(55, seed=1), resized(50, seed=2)
    model = get_peft_model(base, ActConfig(channels={"lm_head": [3, 51]}))
    with pytest.warns(ActWarning, match="are not transferred"):
        initialize_from_donor(model, donor, transfer_scale=1.0)
    delta = model.get_base_model().lm_head.act_delta_weight["default"].detach()
    assert torch.equal(
        delta[0], (donor.lm_head.weight[3] - model.get_base_model().lm_head.base_layer.weight[3]).detach()
    )
    assert torch.equal(delta[1], torch.zeros(16))


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


FORMS = {
    "a base model without head": lambda tensors: {
        n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"
    },
    "inside a multimodal model": lambda tensors: {
        **{n.replace("model.", "model.language_model.") if "lm_head" not in n else n: t for n, t in tensors.items()},
        "model.visual.layers.0.mlp.up_proj.weight": torch.ones(24, 16),
    },
    "a model in a model": lambda tensors: {f"language_model.{n}": t for n, t in tensors.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_with_other_prefixes_give_the_same_deltas(tmp_path, form):
    base, donor = build("llama"), resized(VOCABULARY, seed=3)
    donor.save_pretrained(tmp_path)
    excluded = ["lm_head"] if "without" in form else None
    expected = with_donor(base, tmp_path, exclude_modules=excluded).state_dict()
    rewrite(tmp_path, FORMS[form])
    got = with_donor(base, tmp_path, exclude_modules=excluded).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    if excluded:
        with pytest.raises(ActValueError, match="lm_head: donor has no weight, the base has weight"):
            with_donor(base, tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_and_untied_embeddings_meet(tmp_path):
    tied, untied = resized(VOCABULARY, seed=1, tie_word_embeddings=True), resized(VOCABULARY, seed=2)
    for name, base, donor in (("tied", untied, tied), ("untied", tied, untied)):
        donor.save_pretrained(tmp_path / name)
        model = with_donor(base, tmp_path / name).get_base_model()
        rows = random_mask(base, 0.5)["lm_head"]
        expected = donor.lm_head.weight[rows] - base.lm_head.weight[rows]
        assert torch.equal(model.lm_head.act_delta_weight["default"], expected)


def test_a_donor_in_memory_must_be_plain():
    base = build("llama")
    donor = get_peft_model(build("llama"), ActConfig(channels={"up_proj": [1]}))
    model = get_peft_model(base, ActConfig(channels={"up_proj": [1]}))
    with pytest.raises(ActTypeError, match="PeftModel with adapters in it, expected a plain model"):
        initialize_from_donor(model, donor)


def test_a_quantized_donor_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(ActValueError, match=rf"{name} is torch.int8, expected float64, .* take the original one"):
        with_donor(build("llama"), tmp_path)


def test_only_the_selected_rows_of_the_donor_are_read(tmp_path, monkeypatch):
    resized(VOCABULARY, seed=2).save_pretrained(tmp_path)
    read = []
    from act_peft.disk.checkpoint import Checkpoint

    real = Checkpoint.rows

    def rows(self, name, index, dim=0):
        read.append((name, index.tolist()))
        return real(self, name, index, dim)

    monkeypatch.setattr(Checkpoint, "rows", rows)
    monkeypatch.setattr(Checkpoint, "tensor", None)
    get_peft_model(build("llama"), ActConfig(channels={"layers.1.mlp.up_proj": [3, 7]}, donor=str(tmp_path)))
    assert read == [("model.layers.1.mlp.up_proj.weight", [3, 7])]


def test_a_specialised_base_with_added_tokens_takes_from_its_ancestor(tmp_path):
    """The base is the specialised model: fine-tuned, with tokens of its own; the donor is what it was made from."""
    ancestor = build("llama")
    ancestor.save_pretrained(tmp_path)
    base = resized(VOCABULARY + 3, seed=5)
    with pytest.warns(ActWarning, match="the 3 rows beyond the common ones are not transferred"):
        model = with_donor(base, tmp_path)
    merged = model.merge_and_unload()
    rows = random_mask(base, 0.5)["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(
        merged.model.layers[0].mlp.up_proj.weight[rows], ancestor.model.layers[0].mlp.up_proj.weight[rows]
    )
    assert torch.equal(merged.lm_head.weight[VOCABULARY:], base.lm_head.weight[VOCABULARY:])


def test_the_recorded_configuration_names_the_donor(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path / "donor")
    with_donor(base, tmp_path / "donor").save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["donor"] == str(tmp_path / "donor")
