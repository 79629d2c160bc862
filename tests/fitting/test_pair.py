"""Which modules are fitted, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from act_peft import fit
from act_peft.errors import ActValueError
from act_peft.fitting.pair import find_pairs
from tests.fitting.conftest import batches, relatives


class Toy(nn.Module):
    """Embedding, two linear modules, output layer."""

    def __init__(self, *, bias: bool = False, width: int = 4, tokens: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.first = nn.Linear(width, width, bias=bias)
        self.second = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        return self.head(self.first(x) + self.second(x))


def test_modules_with_one_weight_are_one() -> None:
    base, donor = relatives("gemma")
    pairs = {pair.name: pair for pair in find_pairs(base, [donor])}
    assert pairs["model.embed_tokens"].names == ("model.embed_tokens", "lm_head")
    assert pairs["model.embed_tokens"].linear == "lm_head"
    assert "lm_head" not in pairs
    assert pairs["model.norm"].linear is None
    names = [name for pair in pairs.values() for name in pair.names]
    assert len(names) == len(set(names)) == 29


def test_differences_have_rows_of_channels_and_the_bias_last() -> None:
    base, donor = relatives("gpt2")
    (pair,) = find_pairs(base, [donor], target_modules=[r"h.0.attn.c_attn"])
    (difference,) = pair.differences(slice(2, 5))
    mine, theirs = base.transformer.h[0].attn.c_attn, donor.transformer.h[0].attn.c_attn
    assert torch.equal(difference[:, :-1], (theirs.weight - mine.weight).detach()[:, 2:5].T)
    assert torch.equal(difference[:, -1], (theirs.bias - mine.bias).detach()[2:5])


def test_tied_in_the_base_alone() -> None:
    base, donor = relatives("gemma")
    donor.lm_head.weight = nn.Parameter(donor.lm_head.weight.detach().clone())
    with pytest.raises(ActValueError, match="embed_tokens: shares its weight with lm_head in the base, but not"):
        find_pairs(base, [donor])
    assert find_pairs(donor, [base])  # the other way round both are fitted apart


def test_tied_in_another_way() -> None:
    base, donor = Toy(), Toy()
    for model in (base, donor):
        model.second.weight = model.first.weight
    with pytest.raises(ActValueError, match="first: shares its weight with second, expected that only of embeddings"):
        find_pairs(base, [donor])


def test_a_bias_in_one_model_alone() -> None:
    with pytest.raises(ActValueError, match="first: the base has a bias, the donor no bias, expected two models of"):
        find_pairs(Toy(bias=True), [Toy()])
    with pytest.raises(ActValueError, match="first: the base has no bias, the donor a bias"):
        find_pairs(Toy(), [Toy(bias=True)])


def test_weights_without_data() -> None:
    base, donor = Toy(), Toy()
    with pytest.raises(
        ActValueError, match=r"embedding: the donor's weight has no data in memory \(device meta\), expected"
    ):
        find_pairs(base, [donor.to("meta")])


def test_quantized_weights() -> None:
    base, donor = Toy(), Toy()
    base.first.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ActValueError, match="first: the base's weight is quantized, expected plain numbers"):
        find_pairs(base, [donor])


def test_the_second_donor_is_named() -> None:
    with pytest.raises(ActValueError, match="embedding: the donor 1's weight has no data"):
        find_pairs(Toy(), [Toy(), Toy().to("meta")])


def test_a_tied_output_layer_with_a_bias_keeps_it() -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        toy = Toy()
        toy.head = nn.Linear(4, 48)
        toy.head.weight = toy.embedding.weight
        models.append(toy.double())
    module = fit(*models, batches(seed=0), batches(seed=1)).modules["embedding"]
    assert module.names == ("embedding", "head")
    assert module.bias is None
