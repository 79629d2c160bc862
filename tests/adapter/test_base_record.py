from __future__ import annotations

import hashlib
import struct

import torch

from act_peft.adapter.base_record import fingerprint


def test_it_is_the_hash_of_the_values_rounded_to_bfloat16():
    weight, bias = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([4.0, -1.5])
    # a bfloat16 is the upper half of a float32
    values = [1.0, -2.0, 0.5, 3.0, 4.0, -1.5]
    data = b"".join(struct.pack("<f", value)[2:] for value in values)
    assert fingerprint(weight, bias) == hashlib.sha256(data).hexdigest()[:16]
    assert fingerprint(weight, bias) == fingerprint(weight.bfloat16(), bias.bfloat16())


def test_it_tells_values_apart_and_reads_views():
    weight = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(weight) != fingerprint(weight + 1)
    assert fingerprint(weight) != fingerprint(weight, torch.zeros(3))
    assert fingerprint(weight.T.contiguous().T) == fingerprint(weight)
    assert len(fingerprint(torch.empty(0, 4))) == 16
