import copy

import pytest
import torch
from torch import nn

from act_peft.errors import ActValueError, ActWarning
from tests.support.pairs import localize_every

SCORES = ["activation", "weight", "attribution"]


def resized(model, tokens):
    torch.manual_seed(9)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(tokens, mean_resizing=False)
    return larger


def run(base, donor, batches, score, **options):
    return localize_every(base, donor, *([] if score == "weight" else [batches]), score=score, **options)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 ties its embeddings
@pytest.mark.parametrize("larger", ["base", "donor"])
def test_the_common_rows_are_compared(score, family, larger, pair, batches):
    base, donor = pair(family)
    expected = run(base, donor, batches, score)
    models = {"base": base, "donor": donor}
    models[larger] = resized(models[larger], 47)
    with pytest.warns(ActWarning, match=r"lm_head: the base has 4. rows, the donor 4.. Only the first 40, .*; 7 rows"):
        scores = run(*models.values(), batches, score)
    head = 47 if larger == "base" else 40
    assert scores.num_channels["lm_head"] == head
    assert scores.num_comparable["lm_head"] == 40
    assert not scores["lm_head"][40:].any()
    for name in expected:
        if score == "attribution":  # the loss sums over all tokens of the base
            assert name == "lm_head" or scores[name].shape == expected[name].shape
        else:
            torch.testing.assert_close(scores[name][: len(expected[name])], expected[name], rtol=1e-5, atol=1e-8)
    mask = scores.top(1.0)
    assert mask["lm_head"].tolist() == list(range(40))
    assert mask.num_channels["lm_head"] == head


def test_attribution_over_the_common_rows(pair, batches):
    """Rows that the donor does not have stay as they are: the same as a donor that shares them with the base."""
    base, donor = pair()
    base = resized(base, 47)
    filled = resized(donor, 47)
    with torch.no_grad():
        for ours, theirs in ((filled.lm_head, base.lm_head), (filled.model.embed_tokens, base.model.embed_tokens)):
            ours.weight[40:] = theirs.weight[40:]
    expected = localize_every(base, filled, batches, score="attribution")
    with pytest.warns(ActWarning, match="7 rows"):
        scores = localize_every(base, donor, batches, score="attribution")
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("larger", ["base", "donor"])
def test_tokens_that_one_model_does_not_know(larger, pair, batches):
    models = dict(zip(("base", "donor"), pair(), strict=True))
    models[larger] = resized(models[larger], 47)
    batches[1]["input_ids"][0, 0] = 43
    message = r"batch 1: input_ids: got token 43, expected tokens below 40, which both .*the base has 4. tokens, the "
    for score in ("activation", "attribution"):
        with pytest.warns(ActWarning), pytest.raises(ActValueError, match=message):
            localize_every(*models.values(), batches, score=score)


def test_other_modules_may_not_differ(pair, batches):
    base, donor = pair()
    donor.model.layers[0].mlp.down_proj = nn.Linear(24, 17, bias=False)
    with pytest.raises(ActValueError, match=r"layers.0.mlp.down_proj: donor has 17 channels"):
        localize_every(base, donor, batches)


def test_a_model_without_known_embeddings(pair, batches, monkeypatch):
    base, donor = pair()

    def unknown():
        raise NotImplementedError("no embeddings")  # what transformers raises for a model that it finds none in

    expected = localize_every(base, donor, batches)
    monkeypatch.setattr(base, "get_input_embeddings", unknown)
    assert localize_every(base, donor, batches) == expected
