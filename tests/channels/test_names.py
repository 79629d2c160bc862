import pytest

from act_peft.channels.names import matches, matching_key
from act_peft.errors import ActTypeError

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, False),
        (NAME, True),
        (r".*\.q_proj", True),
        (r".*q_pro", False),
        ("q_proj", False),  # a regular expression must match the whole name
        (["q_proj"], True),
        (("k_proj", "self_attn.q_proj"), True),
        ({"proj"}, False),
        (frozenset({NAME}), True),
        ([], False),
        (["self_attn"], False),
        ([".*"], False),
    ],
)
def test_matches_as_peft_reads_target_modules(patterns, expected):
    assert matches(NAME, patterns) is expected


def test_a_name_matches_itself_without_dots():
    assert matches("lm_head", ["lm_head"])
    assert not matches("my_lm_head", ["lm_head"])


def test_other_patterns_are_refused():
    with pytest.raises(ActTypeError, match=r"module names: got int, expected a regular expression"):
        matches(NAME, 3)


def test_matching_key_prefers_the_exact_then_the_longest():
    assert matching_key(NAME, ["q_proj", NAME, "self_attn.q_proj"]) == NAME
    assert matching_key(NAME, {"q_proj": 1, "self_attn.q_proj": 2}) == "self_attn.q_proj"
    assert matching_key(NAME, ["_proj", "k_proj"]) is None
    assert matching_key(NAME, []) is None
