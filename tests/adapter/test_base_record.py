from __future__ import annotations

import hashlib
import struct

import torch

from act_peft.adapter.base_record import BaseComparison, fingerprint, recorded_base


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


def test_a_comparison_counts_what_differs():
    comparison = BaseComparison("adapter 'x'")
    comparison.add_("a", "1", lambda: "1")
    comparison.add_("b", "1", lambda: None)  # cannot be read
    assert comparison.note() is None
    comparison.add_("c", "1", lambda: "2")
    comparison.add_("d", "1", lambda: "3")
    assert comparison.note() == (
        "adapter 'x' was made for a base with other weights: 2 of 3 modules differ, the first is c"
    )


def test_a_comparison_names_the_base_and_reads_only_what_is_recorded():
    comparison = BaseComparison("x", "org/base")
    comparison.add_("a", None, lambda: 1 / 0)
    comparison.add_("b", "1", lambda: "2")
    assert comparison.note() == (
        "x was made for a base with other weights than org/base: 1 of 1 modules differ, the first is b"
    )


def test_what_is_recorded_is_read_with_care():
    assert recorded_base({"a": {"base": "1"}}, "a") == "1"
    for damaged in (None, [], {"a": 3}, {"a": {}}, {"a": {"base": 3}}, {"b": {"base": "1"}}):
        assert recorded_base(damaged, "a") is None
