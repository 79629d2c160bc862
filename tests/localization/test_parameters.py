import pytest
import torch
from torch import nn

from act_peft.errors import ActValueError
from act_peft.localization.candidates import find_candidates
from act_peft.localization.weights import parameter_pairs


def test_pairs(pair):
    base, donor = pair("qwen2")
    pairs = parameter_pairs(find_candidates(base, donor, target_modules=".*"))
    query = pairs["model.layers.0.self_attn.q_proj"]
    assert [(p.part, p.channel_dim) for p in query] == [("weight", 0), ("bias", 0)]
    assert query[0].base.data_ptr() == base.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert torch.equal(query[1].donor, donor.model.layers[0].self_attn.q_proj.bias)
    assert [(p.part, p.channel_dim) for p in pairs["model.embed_tokens"]] == [("weight", 1)]
    assert [(p.part, p.channel_dim) for p in pairs["model.norm"]] == [("weight", 0)]


def test_embeddings_of_other_vocabularies(toy):
    base, donor = toy()
    donor.embed = nn.Embedding(33, 6)
    (embedding,) = parameter_pairs(find_candidates(base, donor, target_modules=".*"))["embed"]
    assert torch.equal(embedding.base, base.embed.weight[:33])
    assert torch.equal(embedding.donor, donor.embed.weight)


def test_other_inputs(toy):
    base, donor = toy()
    donor.head = nn.Linear(7, 5)
    with pytest.raises(
        ActValueError, match=r"head: donor has weight \[5, 7\], the base has weight \[5, 6\], expected the same"
    ):
        parameter_pairs(find_candidates(base, donor, target_modules=".*"))
