"""Every parameter of a model has one key in a checkpoint: prefixes, ties, and names that are not there."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from act_peft import ActValueError
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.keys import CheckpointKeys
from act_peft.disk.parameters import Parameters
from act_peft.disk.shard import Shard
from tests.support.architecture_settings import ENCODER
from tests.support.tiny_models import build

LAYERS = ("layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight", "embed_tokens.weight")
MODEL = (*(f"model.{name}" for name in LAYERS), "lm_head.weight")
PREFIXES = {
    "the same": (MODEL, MODEL),
    "a base model": (MODEL, (*LAYERS, "lm_head.weight")),
    "a model with head, read as a base model": (LAYERS, MODEL),
    "a wrapper of the body": (
        MODEL,
        (*(f"model.language_model.{name}" for name in LAYERS), "lm_head.weight"),
    ),
    "a wrapper of the whole": (
        MODEL,
        (*(f"language_model.{name}" for name in MODEL[:-1]), "language_model.lm_head.weight"),
    ),
}
TIED = {"lm_head.weight", "model.embed_tokens.weight"}


def written(folder, keys, **config):
    """A checkpoint with these keys."""
    save_file(
        {key: torch.full((2, 2), float(number)) for number, key in enumerate(keys)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("what", PREFIXES)
def test_names_of_a_model_find_their_keys(tmp_path, what):
    names, keys = PREFIXES[what]
    vision = [f"model.visual.{name}" for name in LAYERS[:2]] if "wrapper" in what else []
    with Checkpoint.open(written(tmp_path, [*vision, *keys], tie_word_embeddings=False)) as checkpoint:
        found = CheckpointKeys(checkpoint, names)
        expected = [
            key for key in keys if what != "a model with head, read as a base model" or key != "lm_head.weight"
        ]
        assert [found.key(name) for name in names] == [found.own_name(name) for name in names] == expected
        assert all(found.holds(name) for name in names)
        assert [found.parameter(key) for key in expected[:4]] == list(names[:4])


def test_without_a_common_name_nothing_is_changed(tmp_path):
    with Checkpoint.open(written(tmp_path, ["something.else"], tie_word_embeddings=False)) as checkpoint:
        for names in (MODEL, []):
            keys = CheckpointKeys(checkpoint, names)
            assert not keys.holds("lm_head.weight")
            assert keys.place("lm_head.weight") is None
            assert keys.key("lm_head.weight") == keys.own_name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("wrapper", ["", "language_model."])
def test_a_tied_parameter_has_the_key_of_its_partner(tmp_path, stored, wrapper):
    model = build("llama", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    [missing] = TIED - {stored}
    # A prefix that the class does not know hides the tie.
    tensors = {wrapper + n: t.clone() for n, t in model.state_dict().items() if wrapper or n != missing}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        keys = CheckpointKeys(checkpoint, names)
        assert keys.key(stored) == wrapper + stored
        assert keys.key(missing) == (wrapper + missing if wrapper else stored)
        parameters = Parameters(checkpoint, names)
        assert missing in parameters
        assert torch.equal(parameters.rows(missing, torch.tensor([1])), parameters.rows(stored, torch.tensor([1])))


def test_without_a_configuration_ties_are_unknown(tmp_path):
    written(tmp_path, MODEL)
    (tmp_path / "config.json").unlink()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert CheckpointKeys(checkpoint, MODEL).key(MODEL[0]) == MODEL[0]
        with pytest.raises(ActValueError, match=r"config\.json: no such file"):
            CheckpointKeys(checkpoint, MODEL).holds("nothing")


def test_anything_with_rows_is_a_source(tmp_path):
    written(tmp_path, [f"deep.{name}" for name in LAYERS])
    with Shard(tmp_path / "model.safetensors") as shard:
        parameters = Parameters(shard, LAYERS)
        assert Parameters(parameters, LAYERS).shapes() == parameters.shapes() == dict.fromkeys(LAYERS, (2, 2))
        assert parameters.dtype(LAYERS[1]) == torch.float32
        assert parameters.rows(LAYERS[1], torch.tensor([0])).tolist() == [[1.0, 1.0]]
        assert parameters.location == str(tmp_path / "model.safetensors")


def test_a_missing_parameter_is_named_by_the_key_that_it_should_have(tmp_path):
    with Checkpoint.open(written(tmp_path, MODEL[:-1], tie_word_embeddings=False)) as checkpoint:
        parameters = Parameters(checkpoint, [f"body.{name}" for name in MODEL])
        assert "body.lm_head.weight" not in parameters
        with pytest.raises(ActValueError, match=r"lm_head\.weight is missing in the checkpoint"):
            parameters.shape("body.lm_head.weight")


def test_the_configuration_chooses_between_two_parts(tmp_path):
    decoder = {**ENCODER, "is_decoder": True, "add_cross_attention": True}
    config = transformers.EncoderDecoderConfig(
        encoder={"model_type": "bert", **ENCODER}, decoder={"model_type": "roberta", **decoder}
    )
    transformers.EncoderDecoderModel(config).save_pretrained(tmp_path)
    names = [f"encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)]
    with Checkpoint.open(tmp_path) as checkpoint:
        for model_type, prefix in (("bert", "encoder."), ("roberta", "decoder.roberta.")):
            keys = CheckpointKeys(checkpoint, names, model_types={model_type})
            assert [keys.key(name) for name in names] == [prefix + name for name in names]
        with pytest.raises(ActValueError, match=r"query\.weight may be decoder\.roberta\..*, encoder\.encoder\."):
            CheckpointKeys(checkpoint, names, model_types={"llama"})
