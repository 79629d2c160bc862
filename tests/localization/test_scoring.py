import pytest

from act_peft.channels.scores import ScoreKind
from act_peft.errors import ActTypeError, ActValueError
from act_peft.localization import localize


def test_the_default_is_the_paper(pair, batches):
    scores = localize(*pair(), batches)
    assert scores == localize(*pair(), batches, score="activation")
    assert scores == localize(*pair(), batches, score=ScoreKind.ACTIVATION)
    assert scores.kind is ScoreKind.ACTIVATION


@pytest.mark.parametrize("kind", ["weight", "attribution"])
def test_the_scores_know_their_kind(kind, pair, batches):
    data = [] if kind == "weight" else [batches]
    assert localize(*pair(), *data, score=kind).kind is ScoreKind(kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "gradient"}, r"score: got 'gradient', expected one of 'activation', 'weight', 'attribution'"),
        ({"score": "weight", "dataloader": [1]}, r"dataloader: got one with score='weight', expected none"),
        ({}, r"dataloader: got None, expected batches \(score='activation' needs examples\)"),
        ({"score": "attribution"}, r"dataloader: got None, expected batches \(score='attribution'"),
        ({"dataloader": [1], "keep_dataloader": [1]}, r"keep_dataloader: got one with score='activation', expected n"),
        ({"score": "weight", "keep_dataloader": [1]}, r"keep_dataloader: got one with score='weight', expected none"),
        ({"score": "contrast", "keep_dataloader": [1]}, r"dataloader: got None, expected batches \(score='contrast'"),
        (
            {"score": "contrast", "dataloader": [1]},
            r"keep_dataloader: got None, expected batches \(score='contrast' divides by them\)",
        ),
        (
            {"score": "contrast", "dataloader": [1], "keep_dataloader": [1], "points": 3},
            r"points: got one with score='contrast', expected none",
        ),
        ({"dataloader": [1], "points": 3}, r"points: got one with score='activation', expected none"),
        (
            {"dataloader": [1], "points": 0, "score": "attribution"},
            r"points: got 0, expected an integer of",
        ),
    ],
)
def test_settings_that_would_be_ignored_or_are_missing(options, message, toy):
    with pytest.raises(ActValueError, match=message):
        localize(*toy(), **options)


def test_points_are_counted(toy):
    with pytest.raises(ActTypeError, match=r"points: got 2.0, expected an integer of at least 1"):
        localize(*toy(), [1], score="attribution", points=2.0)
