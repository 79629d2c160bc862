"""Bounded memory: models that take turns, fewer tokens of a sample, outputs on disk."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from act_peft import ActTypeError, ActValueError, localize
from act_peft.batches.answer_tokens import AnswerTokens, find_answer_tokens
from act_peft.localization import comparison
from tests.support.pairs import BUILDERS


@pytest.fixture
def kept(monkeypatch):
    """The bytes of the base's outputs that were kept at any one time, and the largest output."""
    seen = {"most": 0, "largest": 0}
    original = comparison.BatchComparison._keep

    def keep(self, name, args, output):
        self._turns, turns = None, self._turns  # count before the models change turns
        original(self, name, args, output)
        self._turns = turns
        rows = self._kept[name][-1]
        seen["largest"] = max(seen["largest"], rows.nbytes)
        seen["most"] = max(seen["most"], sum(part.nbytes for calls in self._kept.values() for part in calls))
        if turns is not None:
            self._room -= rows.nbytes
            if self._room < 0:
                turns.pause()

    monkeypatch.setattr(comparison.BatchComparison, "_keep", keep)
    return seen


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_models_that_take_turns_give_the_same_scores_with_little_memory(pair, batches, family, kept):
    base, donor = pair(family)
    expected = localize(base, donor, batches)
    everything, kept["most"] = kept["most"], 0
    limit = everything // 5
    assert localize(base, donor, batches, max_memory=limit) == expected
    assert kept["most"] <= limit + kept["largest"] < everything // 2
    assert localize(base, donor, batches, max_memory=1) == expected
    assert threading.active_count() == 1 or "localize base" not in {t.name for t in threading.enumerate()}


def test_turns_take_over_autocast(pair, batches):
    base, donor = pair()
    with torch.autocast("cpu", torch.bfloat16):
        expected = localize(base, donor, batches)
        assert localize(base, donor, batches, max_memory=1) == expected


def test_models_that_share_modules_run_again_for_parts_of_the_tokens(pair, batches):
    base, _ = pair()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = localize(model, model, batches)
    found = localize(model, model, batches, max_memory=2000)
    assert found.num_tokens == expected.num_tokens
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_an_error_in_either_model_ends_both(pair, batches):
    base, donor = pair()
    for broken in (base, donor):
        handle = broken.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            localize(base, donor, batches, max_memory=1)
        handle.remove()
        assert "localize base" not in {thread.name for thread in threading.enumerate()}
    assert localize(base, donor, batches, max_memory=1) == localize(base, donor, batches)


@pytest.mark.parametrize(
    ("skips", "message"),
    [("base", "ran more often in the donor"), ("donor", "ran less often in the donor"), ("both", "did not run")],
)
def test_turns_notice_modules_that_do_not_run(toy, samples, collate, skips, message):
    base, donor = toy(lambda self, hidden: self.extra(hidden), extra=lambda: torch.nn.Linear(6, 6))
    for model, name in ((base, "base"), (donor, "donor")):
        if skips in (name, "both"):
            model.middle = lambda _, hidden: hidden
    with pytest.raises(ActValueError, match=f"extra: {message}"):
        localize(base, donor, [collate(samples)], max_memory=1)


# ------------------------------------------------------------------------------------------------ fewer tokens ---


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_at_most_some_tokens_of_a_sample_evenly(most):
    counts = [7, 1, 0, 3, 10]
    counted = torch.zeros(5, 12, dtype=torch.int64)
    for row, count in enumerate(counts):
        counted[row, 12 - count :] = 1
    tokens = find_answer_tokens({"input_ids": counted, "labels": torch.where(counted == 1, 5, -100)})
    chosen = tokens.at_most(most).index
    for row, count in enumerate(counts):
        mine = (chosen[chosen // 12 == row] % 12 - (12 - count)).tolist()  # numbers of the chosen among the sample's
        expected = [-(-part * count // min(most, count)) for part in range(min(most, count))]
        assert mine == expected


def test_scores_of_fewer_tokens_are_those_of_these_tokens(pair, batches):
    base, donor = pair()
    thinned = []
    for batch in batches:
        labels = torch.full_like(batch["labels"], -100).flatten()
        index = find_answer_tokens(batch).at_most(2).index
        labels[index] = batch["labels"].flatten()[index]
        thinned.append({**batch, "labels": labels.view_as(batch["labels"])})
    found = localize(base, donor, batches, max_tokens=2)
    assert found == localize(base, donor, thinned)
    assert found.num_tokens == 12
    assert isinstance(find_answer_tokens(batches[0]).at_most(None), AnswerTokens)


# ------------------------------------------------------------------------------------------ one by one, on disk ---


def test_models_one_after_the_other_give_the_same_scores(pair, batches, tmp_path):
    base, donor = pair("gemma3")
    assert localize(base, donor, batches, spool=tmp_path) == localize(base, donor, batches)
    seen = []

    def load_base():
        model = pair("gemma3")[0]
        seen.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight))
        return model

    def load_donor():
        assert seen[0]() is None or seen[0]().device.type == "meta"  # only one of them has weights
        return pair("gemma3")[1]

    keep = {"keep_dataloader": batches[:1], "score": "contrast"}
    expected = localize(base, donor, batches, max_tokens=3, **keep)
    assert localize(load_base, load_donor, batches, spool=tmp_path, max_tokens=3, **keep) == expected
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_spool_is_refused(pair, batches, tmp_path, toy):
    base, donor = pair()
    with pytest.raises(ActValueError, match="expected an existing folder"):
        localize(base, donor, batches, spool=tmp_path / "missing")
    with pytest.raises(ActTypeError, match=r"donor: got str, expected a torch.nn.Module, or a function"):
        localize(base, "folder", batches, spool=tmp_path)
    with pytest.raises(ActTypeError, match=r"base: got function, expected a torch.nn.Module"):
        localize(lambda: base, donor, batches)
    with pytest.raises(ActValueError, match="donor has no such module"):
        localize(base, lambda: toy()[1], batches, spool=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "attribution", "max_tokens": 1}, "max_tokens: got one with score='attribution'"),
        ({"score": "attribution", "max_memory": 1}, "max_memory: got one with score='attribution'"),
        ({"score": "attribution", "spool": "x"}, "spool: got one with score='attribution'"),
        ({"every": 1}, "every: got one without checkpoint"),
        ({"checkpoint": "x", "spool": "y"}, "checkpoint: got one together with spool"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected an integer of at least 1"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(pair, batches, settings, message):
    with pytest.raises(ActValueError, match=message):
        localize(*pair(), batches, **settings)


def test_a_checkpoint_is_a_path_and_needs_data(pair, batches):
    with pytest.raises(ActTypeError, match="checkpoint: got int, expected a path"):
        localize(*pair(), batches, checkpoint=3)
    with pytest.raises(ActValueError, match="checkpoint: got one with score='weight'"):
        localize(*pair(), score="weight", checkpoint="x")
