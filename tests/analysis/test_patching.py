"""Exchanged activations, against hooks written out by hand, and where the answer is known."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from act_peft.analysis import Patching, patch_channels
from act_peft.analysis.patched import PatchedRow
from act_peft.channels.masks import ChannelMask
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.localization import localize


def whole(model, *names):
    """A mask of every channel of some modules."""
    counts = {name: model.get_submodule(name).weight.shape[0] for name in names}
    return ChannelMask({name: range(count) for name, count in counts.items()}, counts)


def loss_by_hand(model, other, batch, mask, at):
    """The loss of a model whose channels are overwritten token by token with those of the other model.

    Args:
        at: whether the activations of token t of a sample are exchanged.
    """
    seen = {}
    hooks = [
        other.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        for name in mask
    ]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        other(**inputs)
    [hook.remove() for hook in hooks]

    def overwrite(module, args, out, name):
        out = out.clone()
        for row in range(out.shape[0]):
            for token in range(out.shape[1]):
                for channel in mask[name].tolist():
                    if at(batch, row, token):
                        out[row, token, channel] = seen[name][row, token, channel]
        return out

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: overwrite(m, a, out, name))
        for name in mask
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    [hook.remove() for hook in hooks]
    losses = []
    for row, labels in enumerate(batch["labels"]):
        for token in range(1, len(labels)):
            if labels[token] != -100 and batch["attention_mask"][row, token - 1]:
                losses.append(F.cross_entropy(logits[row, token - 1], labels[token]).double())
    return torch.stack(losses)


def predicts_an_answer(batch, row, token):
    labels = batch["labels"][row]
    return token + 1 < len(labels) and bool(labels[token + 1] != -100) and bool(batch["attention_mask"][row, token])


def is_no_padding(batch, row, token):
    return bool(batch["attention_mask"][row, token])


@pytest.mark.parametrize(("positions", "at"), [("answer", predicts_an_answer), ("all", is_no_padding)])
def test_against_hooks_by_hand(pair, batches, positions, at):
    base, donor = pair()
    up, norm = "model.layers.0.mlp.up_proj", "model.layers.1.input_layernorm"
    mask = ChannelMask({up: [0, 5, 17], norm: [2]}, {up: 24, norm: 16})
    teach(donor, batches)
    found = patch_channels(base, donor, batches, mask, positions=positions, random_draws=0, show_progress=False)
    into_base = torch.cat([loss_by_hand(base, donor, batch, mask, at) for batch in batches])
    into_donor = torch.cat([loss_by_hand(donor, base, batch, mask, at) for batch in batches])
    plain = [torch.cat([loss_by_hand(m, m, b, mask, at) for b in batches]).mean() for m in (base, donor)]
    assert found.base_loss == pytest.approx(float(plain[0]), rel=1e-5)
    assert found.donor_loss == pytest.approx(float(plain[1]), rel=1e-5)
    row = found.rows[0]
    assert (row.channels, row.num_channels, found.num_tokens) == ("selected", 4, len(into_base))
    assert row.base_loss == pytest.approx(float(into_base.mean()), rel=1e-5)
    assert row.donor_loss == pytest.approx(float(into_donor.mean()), rel=1e-5)
    assert row.base_loss != pytest.approx(found.base_loss, rel=1e-5)
    gap = found.base_loss - found.donor_loss
    assert row.sufficiency == pytest.approx((found.base_loss - row.base_loss) / gap)
    assert row.necessity == pytest.approx((row.donor_loss - found.donor_loss) / gap)


def teach(donor, batches):
    """Make the donor better than the base, so that there is a gap."""
    optimizer = torch.optim.Adam(donor.parameters(), lr=1e-2)
    for _ in range(15):
        for batch in batches:
            optimizer.zero_grad()
            donor(**batch).loss.backward()
            optimizer.step()
    return donor.eval()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_channels_of_the_last_layer_give_the_other_model(pair, batches, family):
    base, donor = pair(family)
    teach(donor, batches)
    found = patch_channels(base, donor, batches, whole(base, "lm_head"), random_draws=0, show_progress=False)
    (row,) = found.rows
    assert (row.base_loss, row.donor_loss) == (found.donor_loss, found.base_loss)  # not one bit apart
    assert (row.sufficiency, row.necessity) == (1, 1)


def test_one_forward_pass_for_each_mask(pair, batches):
    base, donor = pair()
    teach(donor, batches)
    scores = localize(base, donor, batches, show_progress=False)
    calls = [0, 0]
    for side, model in enumerate((base, donor)):
        model.register_forward_pre_hook(lambda *_, side=side: calls.__setitem__(side, calls[side] + 1))
    found = patch_channels(base, donor, batches, scores, densities=[0.1, 0.5, 1], random_draws=2, show_progress=False)
    assert calls == [len(batches) * (1 + 3 * 3)] * 2
    assert [(row.name, row.channels) for row in found.rows[:3]] == [
        ("0.1", "selected"),
        ("0.1", "random"),
        ("0.1", "random"),
    ]
    by_name = {row.name: row for row in found.rows if row.channels == "selected"}
    assert by_name["1"].density == 1
    assert "of the loss gap" in found.title
    assert Patching.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert len(str(found).splitlines()) == 3 + 1 + len(found.rows)


def test_random_channels_are_as_many_of_every_module_and_seeded(pair, batches):
    base, donor = pair()
    teach(donor, batches)
    mask = localize(base, donor, batches, show_progress=False).top(0.1)
    one, same, other = (
        patch_channels(base, donor, batches, mask, seed=seed, show_progress=False) for seed in (0, 0, 1)
    )
    assert one == same
    assert one.rows[1].num_channels == one.rows[0].num_channels == mask.num_selected
    assert one.rows[1].base_loss != other.rows[1].base_loss
    assert one.rows[0] == other.rows[0]


@pytest.mark.filterwarnings("ignore::act_peft.ActWarning")
def test_models_come_back_as_they_were(pair, batches):
    base, donor = pair()
    base.train()
    patch_channels(base, donor, batches, whole(base, "model.norm"), show_progress=False)
    assert base.training
    assert not any(module._forward_hooks for model in (base, donor) for module in model.modules())


@pytest.mark.filterwarnings("ignore::act_peft.ActWarning")
def test_norms_over_heads_and_adapters_as_donors(pair, batches):
    base, donor = pair("gemma3")
    heads = whole(base, "model.layers.0.self_attn.q_norm")
    found = patch_channels(base, donor, batches, heads, random_draws=0, show_progress=False)
    assert found.rows[0].base_loss != found.base_loss
    adapted = get_peft_model(pair()[0], LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    everything = whole(adapted.get_base_model(), "lm_head")
    (row,) = patch_channels(adapted, adapted, batches, everything, random_draws=0, show_progress=False).rows
    found = patch_channels(adapted, adapted, batches, everything, random_draws=0, show_progress=False)
    assert (row.base_loss, row.donor_loss) == (found.donor_loss, found.base_loss)


def test_without_a_gap_there_is_a_warning(pair, batches):
    base, donor = pair()
    teach(base, batches)
    with pytest.warns(ActWarning, match="the donor's loss is .* there is no gap to close"):
        found = patch_channels(base, donor, batches, whole(base, "model.norm"), show_progress=False)
    assert found.rows[0].sufficiency is None
    assert found.best is None
    assert "is not below the base's" in found.title


def test_wrong_arguments(pair, batches):
    base, donor = pair()
    mask = whole(base, "lm_head")
    with pytest.raises(ActTypeError, match="selection: got list, expected ChannelScores, a ChannelMask"):
        patch_channels(base, donor, batches, [mask])
    with pytest.raises(ActValueError, match="selection: got no mask"):
        patch_channels(base, donor, batches, {})
    with pytest.raises(ActValueError, match="densities: got some for a mask"):
        patch_channels(base, donor, batches, mask, densities=[0.1])
    with pytest.raises(ActValueError, match="selection: got no selected channel"):
        patch_channels(base, donor, batches, ChannelMask({}, {"lm_head": 40}))
    with pytest.raises(ActValueError, match="lm_head: the base has 40 channels, 40 of which both models have, the ma"):
        patch_channels(base, donor, batches, ChannelMask({"lm_head": [0]}, {"lm_head": 50}))
    with pytest.raises(ActValueError, match="other: the base has no such module, the mask b was made for 3"):
        patch_channels(base, donor, batches, {"a": mask, "b": ChannelMask({"other": [0]}, {"other": 3})})
    with pytest.raises(ActValueError, match="positions: got 'prompt', expected one of 'answer', 'all'"):
        patch_channels(base, donor, batches, mask, positions="prompt")
    with pytest.raises(ActValueError, match="dataloader: got no batch"):
        patch_channels(base, donor, [], mask)
    with pytest.raises(ActValueError, match="random_draws: got -1"):
        patch_channels(base, donor, batches, mask, random_draws=-1)


class TestModulesThatDoNotFit:
    @pytest.fixture
    def lm(self, pair):
        return pair()

    def test_one_that_does_not_run(self, lm, batches):
        base, donor = lm
        for model in lm:
            model.unused = torch.nn.Linear(3, 3)
        with pytest.raises(ActValueError, match=r"unused: did not run, expected every module of the masks.*\(1 of 1"):
            patch_channels(base, donor, batches, whole(base, "unused"), show_progress=False)

    def test_one_that_runs_more_often(self, lm, batches):
        base, donor = lm
        again = base.model.layers[0].register_forward_hook(lambda m, args, out: (base.model.norm(args[0]), None)[1])
        with pytest.raises(ActValueError, match=r"model.norm: ran more often than in the other model"):
            patch_channels(base, donor, batches, whole(base, "model.norm"), show_progress=False)
        again.remove()

    def test_one_without_a_row_for_every_token(self, lm, batches):
        base, donor = lm
        for model in lm:
            model.pool = torch.nn.Linear(16, 3)
            model.model.norm.register_forward_hook(lambda m, a, out, model=model: (model.pool(out.mean(1)), out)[1])
        with pytest.raises(
            ActValueError, match=r"pool: got an output of shape .* \(leave the module out of the masks"
        ):
            patch_channels(base, donor, batches, whole(base, "pool"), show_progress=False)


ROW = PatchedRow("0.1", "selected", 0.1, 10, 1.0, 0.5, 0.4, 0.1, 0.3, None)
GOOD = Patching((ROW,), 1.0, 0.5, 4, 8, "answer", 0).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sweep"}, "patching: got kind 'sweep', expected 'patching' with at least one row"),
        ({"rows": []}, "patching: got kind 'patching', expected 'patching' with at least one row"),
        ({"rows": [3]}, "patching: got a row of type int, expected an object"),
        ({"rows": [{}]}, "patching: 'name' is missing"),
        ({"rows": [{**GOOD["rows"][0], "name": 3}]}, "patching: got 3, expected a text"),
        ({"rows": [{**GOOD["rows"][0], "density": None}]}, "patching: density: got None, expected a finite number"),
        ({"rows": [{**GOOD["rows"][0], "sufficiency": "x"}]}, "patching: sufficiency: got 'x'"),
        ({"base_loss": float("nan")}, "patching: base_loss: got nan"),
        ({"positions": 3}, "patching: got 3, expected a text"),
        ({"seed": -1}, "patching: seed: got -1"),
    ],
)
def test_damaged_results_are_refused(changes, message):
    with pytest.raises(ActValueError, match=message):
        Patching.from_dict({**GOOD, **changes})
    assert Patching.from_dict(GOOD).rows == (ROW,)
