"""Attributions against autograd in float64, against the loss itself, and in the linear case."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from act_peft.channels.kinds import channel_kind
from act_peft.errors import ActValueError
from tests.support.pairs import localize_every

FAMILIES = ["llama", "qwen2", "gpt2", "gemma3"]
# transformers computes the loss of a float64 model in float32.
ROUNDED = {"rtol": 1e-4, "atol": 2e-7}


def token_losses(logits, labels):
    """The loss of every token, as a loop over samples and tokens."""
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                yield -torch.log_softmax(logits[b, t - 1], -1)[labels[b, t]]


def mean_loss(model, batches):
    losses = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses += token_losses(logits, batch["labels"])
    return torch.stack(losses).mean(), len(losses)


def untied(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    return model


def oracle(base, donor, batches, points):
    """Gradients of the whole loss at whole models on the line, channel by channel."""
    modules, others = untied(copy.deepcopy(base)), dict(untied(copy.deepcopy(donor)).named_modules())
    start = untied(copy.deepcopy(base))
    scores = {}
    for point in range(points):
        with torch.no_grad():
            for (name, p), q in zip(modules.named_parameters(), start.parameters(), strict=True):
                module, _, part = name.rpartition(".")
                p.copy_(q + point / points * (getattr(others[module], part) - q))
        modules.zero_grad()
        loss, count = mean_loss(modules, batches)
        loss.backward()
        for name, module in modules.named_modules():
            kind = channel_kind(module)
            if kind is None:
                continue
            origin, total = start.get_submodule(name), 0
            for part in ("weight", "bias"):
                if getattr(module, part, None) is None:
                    continue
                step = (getattr(others[name], part) - getattr(origin, part)).detach()
                effect = -(getattr(module, part).grad * step)
                if part == "weight":
                    effect = effect.movedim(kind.channel_dim, 0)
                total = total + torch.stack([row.sum() for row in effect])
            scores[name] = scores.get(name, 0) + total / points
    return scores, count


@pytest.fixture
def doubles(pair):
    """A function that builds a pair in float64."""
    return lambda family="llama": [model.double() for model in pair(family)]


def assert_close(got, expected, **tolerance):
    assert list(got) == list(expected)
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_times_difference(family, points, doubles, batches):
    base, donor = doubles(family)
    expected, count = oracle(base, donor, batches, points)
    scores = localize_every(base, donor, batches, score="attribution", points=points)
    assert scores.num_tokens == count
    assert_close(scores, expected, **ROUNDED)
    assert any((values < 0).any() for values in scores.values())


def test_finite_differences(doubles, batches):
    base, donor = doubles("gpt2")  # computes in float64 throughout, unlike the others' norms
    scores = localize_every(base, donor, batches, score="attribution", points=1)
    for name, channel in (("lm_head", 3), ("transformer.h.1.attn.c_attn", 5), ("transformer.wte", 2)):
        losses = []
        for step in (-1e-5, 1e-5):
            moved = untied(copy.deepcopy(base))
            ours, theirs = moved.get_submodule(name), donor.get_submodule(name)
            with torch.no_grad():
                for part in ("weight", "bias"):
                    if getattr(ours, part, None) is None:
                        continue
                    by_column = part == "weight" and name != "lm_head"
                    at = (slice(None), channel) if by_column else channel
                    getattr(ours, part)[at] += step * (getattr(theirs, part)[at] - getattr(ours, part)[at])
                losses.append(float(mean_loss(moved, batches)[0]))
        slope = (losses[1] - losses[0]) / 2e-5
        assert float(scores[name][channel]) == pytest.approx(-slope, rel=1e-4)


def test_all_channels_add_up_to_the_fall_of_the_loss(doubles, batches):
    """The sum over a finer and finer line is the loss's whole difference between the models."""
    base, donor = doubles("gpt2")
    batches = batches[:1]
    with torch.no_grad():
        fall = float(mean_loss(base, batches)[0] - mean_loss(donor, batches)[0])
    sums = {}
    for points in (20, 40):
        scores = localize_every(base, donor, batches, score="attribution", points=points)
        sums[points] = sum(float(values.sum()) for values in scores.values())
    # The error of a sum over the left ends of steps is proportional to the step.
    assert 2 * sums[40] - sums[20] == pytest.approx(fall, abs=0.01 * abs(sums[20] - fall))


class Linear(nn.Module):
    """A model whose loss is linear in its parameters."""

    def __init__(self, weight):
        super().__init__()
        self.embed = nn.Embedding(40, 2)
        self.head = nn.Linear(2, 3)
        with torch.no_grad():
            self.embed.weight.copy_(torch.arange(80.0).view(40, 2))
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, input_ids, labels, **_):
        counted = labels[:, 1:] != -100
        outputs = self.head(self.embed(input_ids))[:, 1:][counted]  # [N, 3]
        return SimpleNamespace(loss=(outputs * torch.tensor([1.0, -2.0, 4.0])).sum(-1).mean())


@pytest.mark.parametrize("points", [1, 2, 5])
def test_the_linear_case_is_exact(points):
    base, donor = Linear(torch.zeros(3, 2)), Linear(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, -100, 3]])}
    scores = localize_every(base, donor, [batch], score="attribution", target_modules=["head"], points=points)
    assert scores.num_tokens == 1
    # token 3 is embedded as (6, 7): the outputs change by 6, 7 and 13, the loss by 6, -14 and 52
    assert scores["head"].tolist() == [-6, 14, -52]


def test_the_loss_on_data_to_keep_counts_as_much(doubles, batches):
    base, donor = doubles()
    ability = localize_every(base, donor, batches[:1], score="attribution")
    keep = localize_every(base, donor, batches[1:], score="attribution")
    both = localize_every(base, donor, batches[:1], score="attribution", keep_dataloader=batches[1:])
    assert both.num_tokens == ability.num_tokens
    assert_close(both, {name: ability[name] + keep[name] for name in ability}, **ROUNDED)


def test_halves_add_up_and_batches_do_not_matter(doubles, samples, collate):
    base, donor = doubles()
    whole = localize_every(base, donor, [collate(samples)], score="attribution")
    alone = localize_every(base, donor, [collate([sample]) for sample in reversed(samples)], score="attribution")
    left = localize_every(base, donor, [collate(samples[i : i + 2], "left") for i in (0, 2, 4)], score="attribution")
    halves = [localize_every(base, donor, [collate(half)], score="attribution") for half in (samples[:2], samples[2:])]
    for other in (alone, left, halves[0] + halves[1]):
        assert other.num_tokens == whole.num_tokens
        assert_close(other, whole, **ROUNDED)


def test_the_first_token_of_a_text_counts_on_neither_side_of_the_padding(doubles, samples, collate):
    base, donor = doubles()
    texts = [(ids, ids.clone()) for ids, _ in samples]  # nothing is a prompt
    right, left = (
        localize_every(base, donor, [collate(texts, side)], score="attribution") for side in ("right", "left")
    )
    assert left.num_tokens == right.num_tokens == sum(len(ids) - 1 for ids, _ in texts)
    assert_close(left, right, **ROUNDED)


def test_without_labels_the_tokens_are_the_labels(pair, batches):
    base, donor = pair()
    plain = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    labels = plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100)
    expected = localize_every(base, donor, [{**plain, "labels": labels}], score="attribution")
    assert localize_every(base, donor, [plain], score="attribution") == expected
    padded = {**plain, "labels": plain["input_ids"]}  # padding never counts, whatever the labels say
    assert localize_every(base, donor, [padded], score="attribution") == expected


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_models_come_back_as_they_were(error, pair, batches):
    models = pair("gpt2")
    for model in models:
        model.train()
        model.transformer.ln_f.requires_grad_(False)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def state():
        return [
            (p.data_ptr(), p._version, p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.sum().item()))
            for model in models
            for p in model.parameters()
        ] + [[(m.training, list(m._forward_hooks)) for m in model.modules()] for model in models]

    def read():
        yield batches[0]
        if error:
            raise error
        yield batches[1]

    before, rng = state(), torch.get_rng_state()
    if error is None:
        scores = localize_every(*models, read(), score="attribution")
        for model in models:
            model.eval()
        assert scores == localize_every(*models, batches[:2], score="attribution")  # dropout was off
        for model in models:
            model.train()
    else:
        with pytest.raises(type(error)):
            localize_every(*models, read(), score="attribution")
    assert state() == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_it_works_where_gradients_are_off(pair, batches):
    base, donor = pair()
    expected = localize_every(base, donor, batches, score="attribution")
    with torch.no_grad():
        assert localize_every(base, donor, batches, score="attribution") == expected
    base.requires_grad_(False)
    assert localize_every(base, donor, batches, score="attribution") == expected


def test_only_candidates_move(doubles, batches):
    base, donor = doubles()
    scores = localize_every(base, donor, batches, score="attribution", target_modules=["lm_head"], points=2)
    mixed = copy.deepcopy(base)
    mixed.lm_head.load_state_dict(donor.lm_head.state_dict())
    torch.testing.assert_close(scores["lm_head"], oracle(base, mixed, batches, 2)[0]["lm_head"], **ROUNDED)


class TestRefused:
    def test_a_model_without_loss(self, toy, batches):
        with pytest.raises(ActValueError, match=r"batch 0: Toy: returned no loss for labels, expected a model with"):
            localize_every(*toy(), batches, score="attribution")

    def test_a_model_without_gradients_inside(self, pair, batches, monkeypatch):
        base, donor = pair()
        monkeypatch.setattr(type(base), "forward", torch.no_grad()(type(base).forward))
        with pytest.raises(ActValueError, match=r"batch 0: LlamaForCausalLM: the loss does not depend on the candid"):
            localize_every(base, donor, batches, score="attribution")

    def test_embeddings_without_labels(self, pair):
        with pytest.raises(ActValueError, match=r"batch 0: got inputs_embeds without labels, expected labels"):
            localize_every(*pair(), [{"inputs_embeds": torch.ones(1, 3, 16)}], score="attribution")

    def test_nothing_that_the_loss_counts(self, pair):
        batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[3, -100]])}
        with pytest.raises(ActValueError, match=r"batch 0: got answer tokens at the first position of samples only"):
            localize_every(*pair(), [batch], score="attribution")

    def test_gradients_that_are_not_finite(self, pair, batches):
        base, donor = pair()
        with torch.no_grad():
            base.lm_head.weight[2, 2] = float("inf")
        with pytest.raises(ActValueError, match=r"batch 0: .*: got gradients that are not finite"):
            localize_every(base, donor, batches, score="attribution")

    def test_no_data_to_keep(self, pair, batches):
        with pytest.raises(ActValueError, match=r"keep_dataloader: got no batch, expected at least one"):
            localize_every(*pair(), batches, score="attribution", keep_dataloader=[])
