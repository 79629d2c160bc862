"""Several dataloaders in one run of the models: one `ChannelScores` for each."""

from __future__ import annotations

import pytest
import torch

from act_peft.errors import ActTypeError, ActValueError
from act_peft.localization import localize


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
