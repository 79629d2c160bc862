import pytest
import torch
from torch import nn

from act_peft.batches.forward import forward, over_batches
from act_peft.errors import ActTypeError, ActValueError


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids, use_cache=None, **others):
        return {"input_ids": input_ids, "use_cache": use_cache, **others}


def test_what_a_model_receives():
    ids, labels = torch.tensor([[1]]), torch.tensor([[2]])
    batch = {"input_ids": ids, "labels": labels, "num_items_in_batch": 3, "extra": [1]}
    assert forward(Recorder(), batch) == {"input_ids": ids, "use_cache": False, "extra": [1]}
    assert forward(Recorder(), batch, labels=ids)["labels"] is ids
    assert forward(Recorder(), {**batch, "use_cache": True})["use_cache"] is True


def test_errors_name_the_batch():
    def work(batch):
        if batch == 2:
            raise ActTypeError("wrong")

    with pytest.raises(ActTypeError, match=r"^batch 1: wrong$"):
        over_batches([1, 2], work, argument="dataloader", show_progress=False)


def test_no_batch_names_the_argument():
    with pytest.raises(ActValueError, match=r"keep_dataloader: got no batch, expected at least one"):
        over_batches([], print, argument="keep_dataloader", show_progress=False)
