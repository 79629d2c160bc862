from __future__ import annotations

import pytest
import torch

from act_peft.transfer.whole import WholeMoves
from tests.support.tiny_models import build, state_bytes

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight")


def changes_of(model, names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_are_from_the_base_and_rounded_once(dtype):
    model = build("gemma", dtype=dtype)
    before, tied = state_bytes(model), model.lm_head.weight
    originals = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    with WholeMoves(model, NAMES) as moves:
        moves.move_(changes_of(model, NAMES).items())
        second = changes_of(model, NAMES[1:], seed=1)
        moves.move_(second.items())
        assert torch.equal(model.get_parameter(NAMES[0]), originals[NAMES[0]])
        for name, change in second.items():
            assert torch.equal(model.get_parameter(name), (originals[name].float() + change).to(dtype))
        assert model.lm_head.weight is tied is model.model.embed_tokens.weight
    assert state_bytes(model) == before


def test_a_change_is_read_from_the_base_s_own_values():
    model = build("llama")
    original = model.get_parameter(NAMES[0]).detach().clone()
    with WholeMoves(model, NAMES) as moves:
        for _ in range(2):  # doubles, each time from the start
            moves.move_((name, model.get_parameter(name).detach().clone()) for name in NAMES)
            assert torch.equal(model.get_parameter(NAMES[0]), 2 * original)


def test_an_exception_leaves_the_base_as_it_was():
    model = build("llama")
    before = state_bytes(model)

    def broken():
        yield NAMES[0], torch.ones_like(model.get_parameter(NAMES[0]))
        assert state_bytes(model) != before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WholeMoves(model, NAMES) as moves:
        moves.move_(broken())
    assert state_bytes(model) == before
