import pytest
import torch

from act_peft.batches.answer_tokens import AnswerTokens
from act_peft.errors import ActValueError
from act_peft.localization.comparison import select_rows

B, T, H, C = 2, 3, 5, 4
INDEX = torch.tensor([1, 3, 5])  # tokens (0, 1), (1, 0), (1, 2)
TOKENS = AnswerTokens(B, T, INDEX)
OUTPUT = torch.arange(B * T * C).view(B, T, C)
EXPECTED = torch.stack([OUTPUT[0, 1], OUTPUT[1, 0], OUTPUT[1, 2]])


def select(output, *args, tokens=TOKENS, positional=False):
    return select_rows(output, args, tokens, channels=C, positional=positional)


def test_one_row_per_token():
    assert torch.equal(select(OUTPUT), EXPECTED)
    assert torch.equal(select(OUTPUT.view(B * T, C)), EXPECTED)
    assert torch.equal(select(OUTPUT.transpose(0, 1).contiguous().transpose(0, 1)), EXPECTED)


def test_rows_are_copies():
    output = OUTPUT.clone()
    every = AnswerTokens(B, T, torch.arange(B * T))
    for given in (output, output.view(B * T, C), output[:, :, None]):
        select(given, tokens=every).zero_()
    assert torch.equal(output, OUTPUT)


def test_positions_are_repeated_for_every_sample():
    positions = OUTPUT[:1]
    expected = torch.stack([OUTPUT[0, 1], OUTPUT[0, 0], OUTPUT[0, 2]])
    assert torch.equal(select(positions, positional=True), expected)
    assert torch.equal(select(positions[0], positional=True), expected)


@pytest.mark.parametrize("heads", [H, T, 1])
def test_heads(heads):
    by_token = torch.randn(B, T, heads, C)
    expected = torch.cat([by_token[0, 1], by_token[1, 0], by_token[1, 2]])
    assert torch.equal(select(by_token, by_token), expected)
    by_head = by_token.transpose(1, 2)
    assert torch.equal(select(by_head, by_head), expected)
    assert torch.equal(select(by_head.contiguous(), by_head), expected)


@pytest.mark.parametrize(
    "output",
    [
        OUTPUT[:, :2],
        OUTPUT[:1],
        OUTPUT[0],
        OUTPUT.view(-1, C)[:5],
        OUTPUT[..., :3],
        OUTPUT.view(T, B, C),
        torch.zeros(B, 2, 2, C),
        torch.zeros(1, T, H, C),
        torch.zeros(B, T, H, 1, C),
        torch.zeros(C),
    ],
)
def test_outputs_without_a_row_for_every_token(output):
    with pytest.raises(
        ActValueError, match=r"got an output of shape \[.*expected one row of 4 channels for each of the 2 x 3"
    ):
        select(output)


def test_outputs_that_are_no_tensor():
    with pytest.raises(ActValueError, match=r"got an output of type tuple, expected a tensor"):
        select((OUTPUT,))
