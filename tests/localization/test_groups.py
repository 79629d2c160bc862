"""Several dataloaders in one run of the models: one `ChannelScores` for each."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from act_peft import ChannelScores
from act_peft.errors import ActTypeError, ActValueError
from act_peft.localization import localize
from act_peft.localization.candidates import find_candidates
from act_peft.localization.differences import Differences


@pytest.mark.parametrize("score", ["activation", "contrast", "attribution"])
def test_equals_separate_runs(pair, batches, score):
    base, donor = pair()
    groups = {"de": batches[:1], "es": batches[1:]}
    keep = {} if score == "activation" else {"keep_dataloader": batches[:2]}
    found = localize(base, donor, groups, score=score, **keep, show_progress=False)
    assert list(found) == ["de", "es"]
    for name, group in groups.items():
        assert found[name] == localize(base, donor, group, score=score, **keep, show_progress=False)


def test_the_data_to_keep_are_read_once(pair, batches):
    base, donor = pair()
    once = iter(batches[:1])
    found = localize(base, donor, {"a": batches[1:], "b": batches[:1]}, score="contrast", keep_dataloader=once)
    assert found["a"].keep.num_tokens == found["b"].keep.num_tokens > 0


def test_errors_name_the_group(pair, batches):
    base, donor = pair()
    with pytest.raises(ActValueError, match=r"dataloader\['b'\]: got no batch, expected at least one"):
        localize(base, donor, {"a": batches, "b": []}, show_progress=False)
    with pytest.raises(ActTypeError, match=r"dataloader: got the name 3, expected a str"):
        localize(base, donor, {"a": batches, 3: batches})
    for wrong, got in (({}, "an empty dict"), ({"": batches}, "an empty name")):
        with pytest.raises(ActValueError, match=f"dataloader: got {got}, expected dataloaders by name"):
            localize(base, donor, wrong)
    with pytest.raises(ActTypeError, match="batch 0: got str, expected a dict of tensors"):
        localize(base, donor, batches[0], show_progress=False)  # a single batch is no dict of dataloaders
    with pytest.raises(ActValueError, match="dataloader: got one with score='weight'"):
        localize(base, donor, {"a": batches}, score="weight")


def test_the_models_are_prepared_once(pair, batches, monkeypatch):
    base, donor = pair()
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    localize(base, donor, {"a": batches, "b": batches[:1]}, show_progress=False)
    assert len(calls) == len(batches) + 1
    assert torch.is_grad_enabled()


class Ends(RuntimeError):
    pass


def until(batches, number):
    """The first batches, then an error."""
    yield from batches[:number]
    raise Ends


@pytest.mark.parametrize("score", ["activation", "contrast"])
def test_groups_of_models_one_after_the_other(pair, batches, tmp_path, score):
    groups = {"a/b": batches[:1], "c": batches[1:]}
    keep = {"keep_dataloader": batches[:2]} if score == "contrast" else {}
    settings = {"score": score, "max_tokens": 3, "show_progress": False, **keep}
    base, donor = pair()
    found = localize(lambda: pair()[0], lambda: pair()[1], groups, spool=tmp_path, **settings)
    assert found == localize(base, donor, groups, **settings)
    assert found["c"].origin == localize(base, donor, groups, **settings)["c"].origin
    assert found["c"].origin.base.fingerprints
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("score", ["activation", "contrast", "attribution"])
def test_an_interrupted_run_over_groups_goes_on(pair, batches, tmp_path, score):
    base, donor = pair()
    keep = {} if score == "activation" else {"keep_dataloader": batches[:2]}
    settings = {"score": score, "show_progress": False, **keep}
    expected = localize(base, donor, {"a": batches, "b": batches[::-1]}, **settings)
    settings |= {"checkpoint": tmp_path / "sums", "every": 1}
    with pytest.raises(Ends):
        localize(base, donor, {"a": batches, "b": until(batches[::-1], 1)}, **settings)
    names = {"sums.group-0", "sums.group-1", *(["sums.keep"] if keep else [])}
    assert {path.name for path in tmp_path.iterdir()} == names
    partial = ChannelScores.load(tmp_path / "sums.group-1")
    assert 0 < partial.num_tokens < expected["b"].num_tokens
    assert localize(base, donor, {"a": batches, "b": batches[::-1]}, **settings) == expected
    with pytest.raises(ActValueError, match="holds sums of other models or settings"):
        localize(base, donor, {"b": batches[::-1], "a": batches}, **settings)


def test_the_spread_counts_samples_whose_tokens_are_read_in_parts(pair, batches):
    base = pair()[0]
    adapted = get_peft_model(base, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    whole = localize(adapted, adapted, batches, target_modules=["up_proj"], show_progress=False)
    parts = localize(adapted, adapted, batches, target_modules=["up_proj"], max_memory=1, show_progress=False)
    assert parts.num_samples == whole.num_samples
    for name, errors in whole.standard_errors.items():
        assert float(errors.max()) > 0
        torch.testing.assert_close(parts.standard_errors[name], errors, rtol=1e-4, atol=1e-9)


def test_sums_without_a_spread_do_not_go_on(pair, batches):
    base, donor = pair()
    scores = localize(base, donor, batches, show_progress=False)
    sums = Differences(find_candidates(base, donor))
    sums.resume_(scores)
    assert sums.scores() == scores
    with pytest.raises(ActValueError, match="got scores without a spread"):
        sums.resume_(ChannelScores(scores.sums, scores.num_tokens))
