"""Standard errors of scores: from sums over samples, against samples one by one."""

from __future__ import annotations

import hashlib

import pytest
import torch

from act_peft.channels.scores import ChannelScores
from act_peft.channels.spread import Spread
from act_peft.disk import tensorfile
from act_peft.errors import ActTypeError, ActValueError

# Two channels, the differences of the tokens of three samples.
SAMPLES = [[[1.0, 4.0]], [[2.0, 0.0], [4.0, 0.0]], [[3.0, 1.0], [3.0, 1.0], [6.0, 3.0]]]


def scores_of(samples):
    sums = torch.tensor([[sum(column) for column in zip(*sample, strict=True)] for sample in samples]).double()
    counts = torch.tensor([float(len(sample)) for sample in samples]).double()
    spread = Spread({"m": sums.square().sum(0)}, {"m": counts @ sums}, len(samples), int(counts.square().sum()))
    return ChannelScores({"m": sums.sum(0)}, int(counts.sum()), spread=spread)


def errors_by_hand(samples):
    """The standard error of a ratio of sums, sample by sample."""
    found = []
    for channel in range(2):
        sums, counts = [sum(t[channel] for t in sample) for sample in samples], [len(sample) for sample in samples]
        mean = sum(sums) / sum(counts)
        rest = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
        found.append((len(samples) / (len(samples) - 1) * rest) ** 0.5 / sum(counts))
    return found


def test_standard_errors_are_those_of_a_ratio():
    scores = scores_of(SAMPLES)
    assert scores.num_samples == 3
    assert scores.standard_errors["m"].tolist() == pytest.approx(errors_by_hand(SAMPLES))
    assert scores.standard_errors["m"].dtype == torch.float64


def test_with_one_token_a_sample_it_is_the_error_of_a_mean():
    values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0], [3.0, 5.0]]).double()
    scores = scores_of([[row.tolist()] for row in values])
    assert scores.standard_errors["m"].tolist() == pytest.approx((values.std(0) / 2).tolist())


def test_two_runs_are_pooled():
    both = scores_of(SAMPLES[:1]) + scores_of(SAMPLES[1:])
    assert both == scores_of(SAMPLES)
    assert both.standard_errors["m"].tolist() == pytest.approx(errors_by_hand(SAMPLES))
    without = ChannelScores({"m": torch.tensor([1.0, 2.0])}, 3)
    assert (scores_of(SAMPLES) + without).standard_errors is None
    assert without.num_samples is None
    assert without != scores_of(SAMPLES)


def test_a_single_sample_has_no_error():
    assert scores_of(SAMPLES[:1]).standard_errors is None


def test_saves_and_loads_as_version_4(tmp_path):
    scores = scores_of(SAMPLES)
    scores.save(tmp_path / "f")
    assert ChannelScores.load(tmp_path / "f") == scores
    with pytest.raises(ActValueError, match="got version 4 of kind 'channel scores', expected at most 3"):
        tensorfile.read(tmp_path / "f", "channel scores", 3)
    tensors, metadata = tensorfile.read(tmp_path / "f", "channel scores", 4)
    assert metadata == {
        "modules": ["m"],
        "num_tokens": 6,
        "score": "activation",
        "num_comparable": {},
        "num_samples": 3,
        "token_squares": 14,
    }
    assert tensors["m"].tolist() == [[19, 9], [1 + 36 + 144, 16 + 25], [1 + 12 + 36, 4 + 15]]
    assert (
        hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
        == "6b4dd596087d434e5ee9a65a8aacf484fbbbe003bc32b22daba6d238c27931eb"
    )


@pytest.mark.parametrize(
    ("spread", "error", "message"),
    [
        (Spread({}, {}, 3, 14), ActValueError, "squares: got 0 modules, expected exactly the 1 modules of the scores"),
        (
            Spread({"m": torch.ones(3)}, {"m": torch.ones(2)}, 3, 14),
            ActTypeError,
            r"m: squares: got torch.float32 \[3\], expected a floating point tensor \[2\]",
        ),
        (
            Spread({"m": torch.ones(2)}, {"m": 1}, 3, 14),
            ActTypeError,
            r"m: products: got int, expected a floating point tensor \[2\]",
        ),
        (
            Spread({"m": torch.ones(2)}, {"m": torch.tensor([1.0, float("nan")])}, 3, 14),
            ActValueError,
            "m: products: got a number below 0 or not finite",
        ),
        (Spread({"m": torch.ones(2)}, {"m": torch.ones(2)}, 0, 14), ActValueError, "num_samples: got 0, expected"),
        (Spread({"m": torch.ones(2)}, {"m": torch.ones(2)}, 3, 1.5), ActTypeError, "token_squares: got 1.5, expected"),
    ],
)
def test_a_spread_that_does_not_fit(spread, error, message):
    with pytest.raises(error, match=message):
        ChannelScores({"m": torch.tensor([1.0, 2.0])}, 3, spread=spread)


def test_only_scores_by_activation_have_one():
    spread = Spread({"m": torch.ones(2)}, {"m": torch.ones(2)}, 3, 14)
    with pytest.raises(
        ActValueError, match="spread: got one for scores by attribution, expected it for scores by act"
    ):
        ChannelScores({"m": torch.tensor([1.0, 2.0])}, 3, kind="attribution", spread=spread)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (2, {}, r"f: m: got sums of shape \[2, 2\], expected \[3, C\]"),
        (3, {"token_squares": None}, "f: token_squares: got None, expected an integer"),
        (3, {"num_samples": "3"}, "f: num_samples: got '3', expected an integer"),
        (3, {"score": "attribution"}, "f: spread: got one for scores by attribution"),
    ],
)
def test_damaged_files_are_refused(tmp_path, rows, changes, message):
    metadata = {"modules": ["m"], "num_tokens": 1, "num_samples": 3, "token_squares": 14}
    tensorfile.write(tmp_path / "f", "channel scores", 4, {"m": torch.ones(rows, 2)}, {**metadata, **changes})
    with pytest.raises(ActValueError, match=message):
        ChannelScores.load(tmp_path / "f")
