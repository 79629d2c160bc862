"""Scores and masks know which two models they came from, in memory, in their files, and in what is made of them."""

from __future__ import annotations

import pytest
import torch

from act_peft import ActValueError, ChannelMask, ChannelScores
from act_peft.channels.origin import ModelRecord, Origin, check_models
from act_peft.disk import tensorfile

BASE, DONOR = ModelRecord("org/base", {"m": "1", "n": "2"}), ModelRecord("org/donor", {"m": "3", "n": "2"})
ORIGIN = Origin(BASE, DONOR)
SCORES = ChannelScores({"m": torch.tensor([3.0, 1.0]), "n": torch.tensor([2.0])}, 1).with_origin(ORIGIN)
MASK = SCORES.top(0.5)


def test_a_mask_gets_it_from_its_scores():
    assert MASK.origin == ORIGIN
    assert (SCORES + SCORES).origin == ORIGIN
    plain = ChannelScores({"m": torch.tensor([3.0, 1.0]), "n": torch.tensor([2.0])}, 1)
    assert plain.origin is None
    assert plain.top(0.5).origin is None
    assert (plain + SCORES).origin == (SCORES + plain).origin == ORIGIN
    assert plain == SCORES  # the record is no part of the values
    assert SCORES.with_origin(None).origin is None


@pytest.mark.parametrize(
    ("what", "kind", "old"), [(SCORES, "channel scores", 1), (MASK, "channel mask", 1)], ids=["scores", "mask"]
)
def test_files_keep_it_and_have_a_higher_version(what, kind, old, tmp_path):
    what.save(tmp_path / "f")
    loaded = type(what).load(tmp_path / "f")
    assert loaded == what
    assert loaded.origin == ORIGIN
    with pytest.raises(ActValueError, match=f"expected at most {old}"):
        tensorfile.read(tmp_path / "f", kind, old)
    what.with_origin(None).save(tmp_path / "plain")
    tensorfile.read(tmp_path / "plain", kind, old)
    assert type(what).load(tmp_path / "plain").origin is None


@pytest.mark.parametrize(
    "damaged",
    [None, 1, [], {}, {"base": {}, "donor": {}}, {"base": {"name": 1, "fingerprints": {}}, "donor": None}]
    + [{"base": BASE.to_json(), "donor": {"name": None, "fingerprints": wrong}} for wrong in (None, [], {"m": 1})],
)
@pytest.mark.parametrize("what", [SCORES, MASK], ids=["scores", "mask"])
def test_a_damaged_record_is_refused(what, damaged, tmp_path):
    what.save(tmp_path / "f")
    kind = tensorfile.kind_of(tmp_path / "f")
    tensors, metadata = tensorfile.read(tmp_path / "f", kind, 4)
    tensorfile.write(tmp_path / "f", kind, 2, tensors, {**metadata, "origin": damaged})
    with pytest.raises(ActValueError, match="f: origin: got"):
        type(what).load(tmp_path / "f")


def test_sets_of_masks_keep_what_both_know():
    other = ModelRecord("org/second", {"m": "4"})
    law = ChannelMask({"m": [0]}, MASK.num_channels).with_origin(Origin(BASE, other))
    for made in (MASK | law, MASK & law, MASK - law):
        assert made.origin == Origin(BASE, ModelRecord())
    assert (MASK | ChannelMask({}, MASK.num_channels)).origin == ORIGIN
    assert (ChannelMask({}, MASK.num_channels) | MASK).origin == ORIGIN
    apart = Origin(ModelRecord("org/base", {"o": "5"}), ModelRecord(None, {"o": "6"}))
    assert (MASK | ChannelMask({}, {"o": 1}).with_origin(apart)).origin == Origin(
        ModelRecord("org/base", {"m": "1", "n": "2", "o": "5"}), ModelRecord()
    )


def test_runs_of_other_models_are_not_added():
    other = SCORES.with_origin(Origin(BASE, ModelRecord("org/second", {"m": "4"})))
    with pytest.raises(ActValueError, match="m: the donors of the two runs, org/donor and org/second"):
        SCORES + other
    with pytest.raises(ActValueError, match="the bases of the two runs"):
        SCORES.with_origin(Origin(DONOR, BASE)) + SCORES


def test_exchanged_models_are_an_error_and_others_a_note():
    assert check_models(None, base=DONOR, donor=BASE) == []
    assert check_models(ORIGIN, base=BASE, donor=DONOR) == []
    for donor in (None, BASE, DONOR, ModelRecord()):
        with pytest.raises(ActValueError, match=r"org/donor is the base, .*exchanged"):
            check_models(ORIGIN, base=DONOR, donor=donor)
    other = ModelRecord("org/other", {"m": "7", "n": "2"})
    notes = check_models(ORIGIN, base=other, donor=other)
    assert notes == [
        f"the mask was made with a {role} with different weights than org/other: 1 of 2 modules differ, the first is m"
        for role in ("base", "donor")
    ]


def test_without_weights_names_decide():
    named = Origin(ModelRecord("org/base"), ModelRecord("org/donor"))
    with pytest.raises(ActValueError, match="exchanged"):
        check_models(named, base=ModelRecord("org/donor"), donor=ModelRecord("org/base"))
    for base, donor in (("org/base", "org/donor"), ("org/donor", "org/other"), (None, None)):
        assert check_models(named, base=ModelRecord(base), donor=ModelRecord(donor)) == []
    same = Origin(ModelRecord("a"), ModelRecord("a"))
    assert check_models(same, base=ModelRecord("a"), donor=ModelRecord("a")) == []
