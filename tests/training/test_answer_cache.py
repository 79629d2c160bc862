"""Answers are found again for the same sample in another batch, and for no other sample."""

from __future__ import annotations

import pytest
import torch

from act_peft.batches.predictions import find_predictions
from act_peft.training.answer_cache import AnswerCache, sample_keys
from tests.support.teaching import keep_batch


def keys(**inputs):
    return sample_keys(find_predictions(inputs))


def padded(inputs, *, right=0, left=0):
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {n: torch.nn.functional.pad(t, (left, right), value=fill[n]) for n, t in inputs.items()}


def test_order_and_padding_do_not_matter():
    inputs = keep_batch()
    found = keys(**inputs)
    assert len(set(found)) == 4
    order = torch.tensor([2, 0, 3, 1])
    shuffled = padded({name: tensor[order] for name, tensor in inputs.items()}, right=3)
    assert keys(**shuffled) == [found[i] for i in order]
    without_mask = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    assert keys(**without_mask) == found
    assert keys(**inputs, num_items_in_batch=torch.tensor(3), other=None) == found


def test_whatever_changes_the_answer_changes_the_key():
    inputs = keep_batch()
    found = set(keys(**inputs))
    tokens = inputs["input_ids"].clone()
    tokens[:, 0] += 1
    answers = inputs["labels"].clone()
    answers[:, 5] = -100
    others = [
        keys(**{**inputs, "input_ids": tokens}),
        keys(**{**inputs, "labels": answers}),
        keys(**padded(inputs, left=2)),  # absolute positions
        keys(**inputs, position_ids=torch.arange(8).expand(4, 8) + 1),
        keys(**inputs, token_type_ids=torch.ones_like(tokens)),
    ]
    for other in others:
        assert not found & set(other)


def test_positions_in_the_batch_count_in_place_of_the_padding():
    inputs, positions = keep_batch(), torch.arange(8).expand(4, 8)
    shifted = torch.nn.functional.pad(positions, (2, 0))
    assert keys(**inputs, position_ids=positions) == keys(**padded(inputs, left=2), position_ids=shifted)


@pytest.mark.parametrize(
    "more",
    [
        {"pixel_values": torch.zeros(4, 3, 2, 2)},
        {"attention_mask": torch.ones(4, 1, 8, 8)},
        {"decoder_input_ids": keep_batch()["input_ids"]},
        {"adapter_names": ["__base__"] * 4},
    ],
)
def test_a_batch_of_more_than_tokens_has_no_keys(more):
    assert keys(**{**keep_batch(), **more}) is None


def test_embeddings_have_no_keys():
    inputs = keep_batch()
    assert keys(inputs_embeds=torch.zeros(4, 8, 2), labels=inputs["labels"]) is None


def test_what_does_not_fit_is_not_kept():
    cache, hidden = AnswerCache(5), torch.ones(6, 2)
    cache.add(b"a", hidden[:3])
    cache.add(b"b", hidden[3:])
    cache.add(b"c", hidden[3:5])
    cache.add(b"a", 2 * hidden[:3])
    hidden.zero_()
    assert [key in cache for key in (b"a", b"b", b"c")] == [True, False, True]
    assert torch.equal(cache[b"a"], torch.ones(3, 2))
    assert cache.num_tokens == 5
