import pytest
import torch

from act_peft.batches.answer_tokens import find_answer_tokens
from act_peft.errors import ActTypeError, ActValueError

IDS = torch.arange(6).view(2, 3)
LABELS = torch.tensor([[-100, 1, 2], [-100, -100, 5]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": IDS}, [0, 1, 2, 3, 4, 5]),
        ({"input_ids": IDS, "attention_mask": MASK}, [0, 1, 4, 5]),
        ({"input_ids": IDS, "attention_mask": MASK.bool()}, [0, 1, 4, 5]),
        ({"input_ids": IDS, "labels": LABELS}, [1, 2, 5]),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": MASK}, [1, 5]),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": None}, [1, 2, 5]),
        ({"input_ids": IDS, "labels": LABELS, "attention_mask": torch.ones(2, 1, 3, 3)}, [1, 2, 5]),
        ({"inputs_embeds": torch.zeros(2, 3, 8), "labels": LABELS}, [1, 2, 5]),
        ({"input_ids": torch.zeros(2, 9), "decoder_input_ids": IDS, "labels": LABELS}, [1, 2, 5]),
        ({"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :2]}, [0, 1, 2, 3]),
    ],
)
def test_which_tokens_count(batch, expected):
    tokens = find_answer_tokens(batch)
    assert tokens.index.tolist() == expected
    assert tokens.index.dtype == torch.int64
    assert len(tokens) == len(expected)
    shape = batch["decoder_input_ids"].shape if "decoder_input_ids" in batch else (2, 3)
    assert (tokens.batch_size, tokens.length) == tuple(shape)


def test_the_index_is_copied_to_a_device_once():
    tokens = find_answer_tokens({"input_ids": IDS})
    device = torch.device("cpu")
    assert tokens.index_on(device) is tokens.index_on(device)
    assert torch.equal(tokens.index_on(device), tokens.index)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([IDS], ActTypeError, r"got list, expected a dict of tensors"),
        ({"input_ids": IDS.tolist()}, ActTypeError, r"input_ids: got list, expected a tensor"),
        ({"pixels": IDS}, ActValueError, r"got the keys \['pixels'\], expected input_ids or inputs_embeds"),
        ({"input_ids": IDS[0]}, ActValueError, r"input_ids: got shape \[3\], expected \[B, T\]"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:1]},
            ActValueError,
            r"attention_mask: got shape \[1, 3\], expected",
        ),
        ({"input_ids": IDS, "labels": LABELS[:, :2]}, ActValueError, r"labels: got shape \[2, 2\], expected \[2, 3\]"),
        (
            {"input_ids": IDS, "labels": LABELS * 0 - 100},
            ActValueError,
            r"got no answer token among 6 tokens \(all labels are -100 or lie on padding\)",
        ),
        (
            {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK * 0},
            ActValueError,
            r"got no answer token among 6 tokens \(all labels",
        ),
        (
            {"input_ids": IDS, "attention_mask": MASK * 0},
            ActValueError,
            r"got no answer token among 6 tokens \(attention_mask is never 1\)",
        ),
    ],
)
def test_refused(batch, error, message):
    with pytest.raises(error, match=message):
        find_answer_tokens(batch)
