"""Running sums on disk: an interrupted run goes on and gives what an uninterrupted one gives."""

from __future__ import annotations

import pytest
import torch

from act_peft import ActValueError, ChannelScores, localize

SCORES = [
    pytest.param({}, id="activation"),
    pytest.param({"score": "contrast"}, id="contrast"),
    pytest.param({"score": "attribution", "points": 2}, id="attribution"),
]


class Ends(RuntimeError):
    pass


def until(batches, number):
    """The first batches, then an error."""
    yield from batches[:number]
    raise Ends


@pytest.mark.parametrize("settings", SCORES)
def test_an_interrupted_run_goes_on(pair, batches, tmp_path, settings):
    base, donor = pair()
    keep = {"keep_dataloader": batches[::-1]} if settings.get("score") == "contrast" else {}
    expected = localize(base, donor, batches, **settings, **keep)
    settings = {**settings, "checkpoint": tmp_path / "partial", "every": 1}
    with pytest.raises(Ends):
        localize(base, donor, until(batches, 2), **settings, **keep)
    partial = ChannelScores.load(tmp_path / "partial")
    first = localize(base, donor, batches[:2], **({} if keep else {**settings, "checkpoint": None, "every": None}))
    assert partial == first
    assert localize(base, donor, batches, **settings, **keep) == expected
    assert localize(base, donor, batches, **settings, **keep) == expected  # nothing is left to do
    if keep:
        with pytest.raises(Ends):
            localize(
                base, donor, batches, **{**settings, "checkpoint": tmp_path / "b"}, keep_dataloader=until(batches, 1)
            )
        assert ChannelScores.load(tmp_path / "b.keep").num_tokens < partial.num_tokens
        assert localize(base, donor, batches, **{**settings, "checkpoint": tmp_path / "b"}, keep_dataloader=batches)


def test_batches_that_are_done_are_not_run_again(pair, batches, tmp_path):
    base, donor = pair()
    localize(base, donor, batches, checkpoint=tmp_path / "partial")
    base.register_forward_hook(lambda *_: 1 / 0)
    localize(base, donor, batches, checkpoint=tmp_path / "partial")
    with pytest.raises(ZeroDivisionError):
        localize(base, donor, [*batches, batches[0]], checkpoint=tmp_path / "partial")


def test_it_is_written_every_few_batches(pair, batches, tmp_path):
    base, donor = pair()
    with pytest.raises(Ends):
        localize(base, donor, until(batches * 2, 5), checkpoint=tmp_path / "partial", every=2)
    assert ChannelScores.read_progress(tmp_path / "partial")[1] == 4


def test_a_checkpoint_of_something_else_is_refused(pair, batches, tmp_path):
    base, donor = pair()
    path = tmp_path / "partial"
    localize(base, donor, batches, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ActValueError, match="its 3 batches are not the first ones of this dataloader"):
        localize(base, donor, batches[::-1], checkpoint=path)
    with pytest.raises(ActValueError, match="holds 3 batches, the dataloader has 2"):
        localize(base, donor, batches[:2], checkpoint=path)
    for models, settings in (((donor, base), {}), ((base, donor), {"max_tokens": 1})):
        with pytest.raises(ActValueError, match="holds sums of other models or settings"):
            localize(*models, batches, checkpoint=path, **settings)
    with torch.no_grad():
        donor.lm_head.weight.add_(1)
        donor.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(ActValueError, match="holds sums of other models or settings"):
        localize(base, donor, batches, checkpoint=path)
    assert path.read_bytes() == before
    localize(base, donor, batches).save(path)
    with pytest.raises(ActValueError, match="got scores of a finished run, expected a checkpoint"):
        localize(base, donor, batches, checkpoint=path)
