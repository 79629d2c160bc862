from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from act_peft import ActTypeError, ActValueError
from act_peft.sweeps import heldout
from act_peft.sweeps.heldout import HeldOutData
from tests.support.tiny_models import batch, build


def labelled(seed=0, *, rows=2, length=9, answers=4):
    ids = batch(rows=rows, length=length, seed=seed)
    labels = ids.clone()
    labels[:, : length - answers] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def padded(inputs, side, width=3):
    """The same batch with padding, whose labels must not count."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": 7}
    pads = (width, 0) if side == "left" else (0, width)
    return {name: nn.functional.pad(tensor, pads, value=fill[name]) for name, tensor in inputs.items()}


def naive(model, batches):
    """Loss and accuracy by a loop over samples and tokens in float64."""
    losses, hits = [], []
    for inputs in batches:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        labels = inputs.get("labels", inputs["input_ids"].masked_fill(mask == 0, -100))
        for ids, seen, wanted in zip(inputs["input_ids"], mask, labels, strict=True):
            ids, wanted = ids[seen == 1], wanted[seen == 1]
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            for position in range(1, len(ids)):
                if wanted[position] != -100:
                    before = logits[position - 1]
                    shares = [math.exp(float(value) - float(before.max())) for value in before]
                    target = int(wanted[position])
                    losses.append(-math.log(shares[target] / sum(shares)))
                    hits.append(shares.index(max(shares)) == target)
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


def check(model, batches):
    data = HeldOutData(batches, argument="x")
    result = data.measure(model)
    loss, accuracy, count = naive(model, batches)
    assert data.num_tokens == count
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == accuracy
    return result


def test_against_a_loop(family):
    check(build(family), [labelled(0), labelled(1, rows=3, length=12, answers=2)])


def test_answers_that_the_model_gives_are_right():
    model = build("llama")
    inputs = labelled(rows=3, length=12, answers=11)
    with torch.no_grad():
        predicted = model(input_ids=inputs["input_ids"]).logits.argmax(-1)
    inputs["labels"][:, 1:] = predicted[:, :-1]
    assert HeldOutData([inputs], argument="x").measure(model).accuracy == 1.0
    inputs["labels"][0, 1] += 1
    assert check(model, [inputs]).accuracy == 32 / 33


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side, labels):
    model = build("llama")
    inputs = labelled()
    wide = padded(inputs, side)
    if not labels:
        del inputs["labels"], wide["labels"]
    plain, other = check(model, [inputs]), check(model, [wide])
    assert other.loss == pytest.approx(plain.loss, rel=1e-5)
    assert other.accuracy == plain.accuracy


def test_ties_do_not_count():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = HeldOutData([labelled()], argument="x").measure(model)
    assert result.accuracy == 0
    assert result.loss == pytest.approx(math.log(48))


def test_batches_are_pooled_by_tokens_not_by_batches():
    model = build("llama")
    long, short = labelled(0, rows=4, answers=8), labelled(1, rows=1, answers=1)
    both = HeldOutData([long, short], argument="x").measure(model)
    one, other = (HeldOutData([inputs], argument="x").measure(model) for inputs in (long, short))
    assert both.loss == pytest.approx((32 * one.loss + other.loss) / 33)


def test_few_logits_at_once_give_the_same(monkeypatch):
    model, data = build("llama"), HeldOutData([labelled()], argument="x")
    whole = data.measure(model)
    monkeypatch.setattr(heldout, "_CPU_LOGITS", 3 * 48)
    assert data.measure(model).loss == pytest.approx(whole.loss, rel=1e-6)


def test_an_encoder_decoder_is_not_shifted():
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    labels = batch(rows=2, length=5, seed=1)
    start = torch.zeros(2, 1, dtype=torch.int64)
    inputs = {"input_ids": batch(), "labels": labels, "decoder_input_ids": torch.cat((start, labels[:, :-1]), 1)}
    with torch.no_grad():
        expected = float(model(input_ids=inputs["input_ids"], labels=labels).loss)
    assert HeldOutData([inputs], argument="x").measure(model).loss == pytest.approx(expected, rel=1e-5)


def test_a_generator_is_read_once():
    model, inputs = build("llama"), [labelled(0), labelled(1)]
    data = HeldOutData((entry for entry in inputs), argument="x")
    assert data.measure(model) == data.measure(model) == HeldOutData(inputs, argument="x").measure(model)


def test_largest_token():
    inputs = labelled()
    inputs["labels"][0, -1] = 1000
    assert HeldOutData([inputs], argument="x").largest_token == 1000
    inputs["input_ids"][0, 0] = 2000
    assert HeldOutData([inputs], argument="x").largest_token == 2000


def first_only():
    inputs = labelled()
    inputs["labels"][:] = -100
    inputs["labels"][:, 0] = 5
    return inputs


@pytest.mark.parametrize(
    ("dataloader", "error", "message"),
    [
        (7, ActTypeError, "where: got int, expected an iterable of batches"),
        ([], ActValueError, r"where: got no batch, expected at least one \(is the dataset empty, or a generator"),
        ([labelled(), [1]], ActTypeError, "where: batch 1: got list, expected a dict of tensors"),
        ([labelled(answers=0)], ActValueError, "where: batch 0: got no answer token"),
        ([first_only()], ActValueError, "batch 0: got answer tokens at the first position of samples only"),
        ([{"inputs_embeds": torch.zeros(1, 3, 4)}], ActValueError, "got inputs_embeds without labels"),
    ],
)
def test_bad_data(dataloader, error, message):
    with pytest.raises(error, match=message):
        HeldOutData(dataloader, argument="where")


def test_a_model_without_logits():
    model = build("llama").model
    with pytest.raises(ActValueError, match=r"LlamaModel: got logits none, expected \[2, 9, V\]"):
        HeldOutData([labelled()], argument="x").measure(model)


def test_standard_errors_are_by_samples():
    """Against a loop: samples of different numbers of tokens, in two batches."""
    model, other = build("llama"), build("llama", seed=1)
    batches = [labelled(0), labelled(1, rows=3, length=12, answers=2)]
    data = HeldOutData(batches, argument="x")
    mine, theirs = data.measure(model), data.measure(other)
    singles = [
        [naive(one, [{name: tensor[row : row + 1] for name, tensor in batch.items()}]) for one in (model, other)]
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]
    total = sum(count for (_, _, count), _ in singles)
    assert mine.num_tokens == total == 14

    def error(values):
        """Of sums over the samples, with their numbers of tokens."""
        mean = sum(value for value, _ in values) / total
        rest = sum((value - mean * count) ** 2 for value, count in values)
        return math.sqrt(rest * len(values) / (len(values) - 1)) / total

    losses = [[loss * count for loss, _, count in both] for both in singles]
    counts = [count for (_, _, count), _ in singles]
    pairs = list(zip(losses, counts, strict=True))
    assert mine.loss_error == pytest.approx(error([(loss[0], n) for loss, n in pairs]), rel=1e-4)
    hits = [(accuracy * count, count) for (_, accuracy, count), _ in singles]
    assert mine.accuracy_error == pytest.approx(error(hits))
    rise, rise_error = mine.rise_over(theirs)
    assert rise == mine.loss - theirs.loss
    assert rise_error == pytest.approx(error([(loss[0] - loss[1], n) for loss, n in pairs]), rel=1e-4)


def test_of_one_sample_no_error_is_known():
    result = HeldOutData([labelled(0, rows=1)], argument="x").measure(build("llama"))
    assert (result.loss_error, result.accuracy_error) == (None, None)
    unknown = heldout.SkillResult(1.0, 0.5)
    assert (unknown.num_tokens, unknown.loss_error, unknown.accuracy_error) == (None, None, None)
    assert result.rise_over(unknown) == (result.loss - 1.0, None)
