"""Scores by contrast against a loop over modules, tokens and channels in float64."""

from __future__ import annotations

import pytest
import torch

from act_peft.channels.kinds import channel_kind
from act_peft.channels.scores import ScoreKind
from act_peft.errors import ActValueError, ActWarning
from act_peft.localization import localize
from tests.support.pairs import localize_every

ORACLE = {"rtol": 1e-6, "atol": 1e-9}  # outputs are float32, only their difference is rounded


def outputs_at_the_tokens(model, batches):
    """Module name -> its outputs `[N, C]` at all counted tokens, one sample after the other."""
    rows = {}

    def keep(name, tokens):
        return lambda _, __, output: rows.setdefault(name, []).append(output.double().view(len(tokens), -1)[tokens])

    with torch.no_grad():
        for batch in batches:
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                tokens = (labels != -100)[mask == 1]
                handles = [
                    module.register_forward_hook(keep(name, tokens))
                    for name, module in model.named_modules()
                    if channel_kind(module) is not None
                ]
                model(input_ids=ids[mask == 1][None])
                for handle in handles:
                    handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def mean_differences(base, donor, batches):
    """Module name -> list of the mean absolute differences of its channels."""
    ours, theirs = outputs_at_the_tokens(base, batches), outputs_at_the_tokens(donor, batches)
    means = {}
    for name in ours:
        number, channels = ours[name].shape[0], ours[name].shape[-1]
        means[name] = [
            sum(abs(float(theirs[name][t, c]) - float(ours[name][t, c])) for t in range(number)) / number
            for c in range(channels)
        ]
    return means


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_quotient_of_the_two_means(family, pair, batches):
    base, donor = pair(family)
    ability, keep = mean_differences(base, donor, batches[:1]), mean_differences(base, donor, batches[1:])
    scores = localize_every(base, donor, batches[:1], score="contrast", keep_dataloader=batches[1:])
    assert scores.kind is ScoreKind.CONTRAST
    assert set(scores) == set(ability)
    for name in scores:
        floor = 0.1 * sum(keep[name]) / len(keep[name])
        expected = [a / max(k, floor) for a, k in zip(ability[name], keep[name], strict=True)]
        torch.testing.assert_close(
            scores[name],
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-3,  # samples one by one: matrix products of other shapes round differently
            atol=1e-5,
        )


def test_both_parts_are_scores_by_activation(pair, batches):
    base, donor = pair()
    scores = localize(base, donor, batches[:1], score="contrast", keep_dataloader=batches[1:])
    ability, keep = localize(base, donor, batches[:1]), localize(base, donor, batches[1:])
    assert scores.keep.num_tokens == keep.num_tokens
    assert all(torch.equal(values, keep[name]) for name, values in scores.keep.items())
    assert scores.num_tokens == ability.num_tokens
    for name in scores:
        expected = ability[name] / torch.maximum(keep[name], 0.1 * keep[name].mean())
        torch.testing.assert_close(scores[name], expected, rtol=1e-14, atol=0)
    assert "lm_head" not in scores


def test_labels_are_not_needed(pair, batches):
    base, donor = pair()
    plain = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    scores = localize(base, donor, plain[:1], score="contrast", keep_dataloader=plain[1:])
    assert scores.num_tokens == int(plain[0]["attention_mask"].sum())
    assert scores.keep.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in plain[1:])


def test_two_runs_are_pooled(pair, batches):
    base, donor = pair()
    parts = [localize(base, donor, [b], score="contrast", keep_dataloader=[b]) for b in batches[:2]]
    whole = localize(base, donor, batches[:2], score="contrast", keep_dataloader=batches[:2])
    both = parts[0] + parts[1]
    assert (both.num_tokens, both.keep.num_tokens) == (whole.num_tokens, whole.keep.num_tokens)
    for name in whole:
        torch.testing.assert_close(both[name], whole[name], rtol=1e-12, atol=0)


def test_the_same_data_on_both_sides(pair, batches):
    base, donor = pair()
    scores = localize(base, donor, batches, score="contrast", keep_dataloader=batches)
    assert all((values <= 1).all() for values in scores.values())
    assert sum(int((values == 1).sum()) for values in scores.values()) > 0.9 * sum(scores.num_channels.values())


def test_a_model_does_not_differ_from_itself(pair, batches):
    base, _ = pair()
    with pytest.warns(ActWarning, match="all scores are 0: donor and base are equal"):
        localize(base, base, batches, score="contrast", keep_dataloader=batches)


def test_data_to_keep_without_a_batch(pair, batches):
    with pytest.raises(ActValueError, match=r"keep_dataloader: got no batch, expected at least one"):
        localize(*pair(), batches, score="contrast", keep_dataloader=[])
    with pytest.raises(ActValueError, match=r"dataloader: got no batch, expected at least one"):
        localize(*pair(), [], score="contrast", keep_dataloader=batches)
