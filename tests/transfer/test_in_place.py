from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from act_peft import ActConfig, ActValueError, ChannelMask, initialize_from_donor
from act_peft.transfer import in_place as rowmoves
from act_peft.transfer.in_model import donor_for_model
from act_peft.transfer.in_place import RowMoves
from tests.support.tiny_models import build, build_relatives, candidates, random_mask, state_bytes


def nested_masks(model, densities, seed=0):
    """Masks of the first channels of one random order of each module."""
    generator = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(count, generator=generator) for name, count in candidates(model).items()}
    counts = candidates(model)
    return [ChannelMask({n: o[: int(density * len(o))] for n, o in orders.items()}, counts) for density in densities]


def moves_of(base, donor, masks):
    with donor_for_model(base, donor, [name for name, index in masks[-1].items() if index.numel()]) as transfer:
        return RowMoves(base, transfer, masks)


def expected_rows(family, dtype, mask, scale):
    """Weights and biases by a loop over channels: selected ones moved, rounded once, the others the base's."""
    base, donor = build_relatives(family, dtype=dtype)
    expected = {}
    for name, channels in mask.items():
        module, other = base.get_submodule(name), donor.get_submodule(name)
        by_column = type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)
        for part in ("weight", "bias"):
            if getattr(module, part, None) is None:
                continue
            mine, theirs = (getattr(m, part).detach().clone() for m in (module, other))
            for channel in channels.tolist():
                where = (slice(None), channel) if by_column and part == "weight" else channel
                difference = (theirs[where].float() - mine[where].float()).to(dtype).float()
                mine[where] = (mine[where].float() + scale * difference).to(dtype)
            expected[f"{name}.{part}"] = mine
    return expected


@pytest.mark.parametrize("path", [[(0, 0.5), (1, 0.5), (2, 0.5), (2, 1.0)], [(2, 0.3), (0, 0.3), (1, 0.7), (1, 0.7)]])
def test_rows_are_those_of_the_formula_whatever_came_before(family, dtype, path):
    base, donor = build_relatives(family, dtype=dtype)
    before = state_bytes(base)
    masks = nested_masks(base, (0.1, 0.3, 0.6))
    with moves_of(base, donor, masks) as moves:
        for number, scale in path:
            moves.move_(number, scale)
            for name, expected in expected_rows(family, dtype, masks[number], scale).items():
                module, _, part = name.rpartition(".")
                assert torch.equal(getattr(base.get_submodule(module), part), expected), name
    assert state_bytes(base) == before
    assert moves.num_channels == tuple(mask.num_selected for mask in masks)


def test_only_rows_that_change_are_written(monkeypatch):
    base, donor = build_relatives("llama")
    masks = nested_masks(base, (0.2, 0.5))
    written = []
    with moves_of(base, donor, masks) as moves:
        moves.move_(0, 0.5)
        monkeypatch.setattr(
            "act_peft.transfer.in_place._copy", lambda rows, index, values: written.append(index.numel())
        )
        moves.move_(0, 0.5)
        assert written == []
        moves.move_(1, 0.5)
        assert sum(written) == (masks[1] - masks[0]).num_selected
        written.clear()
        moves.move_(1, 0.7)
        assert sum(written) == masks[1].num_selected
        monkeypatch.undo()


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # PEFT, of tied modules
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_rows_are_those_of_a_merged_adapter(family):
    base, donor = build_relatives(family)
    mask = random_mask(base, 0.3)
    adapted = get_peft_model(build_relatives(family)[0], ActConfig(channels=mask))
    initialize_from_donor(adapted, donor, transfer_scale=0.37)
    merged = adapted.merge_and_unload()
    with moves_of(base, donor, [mask]) as moves:
        moves.move_(0, 0.37)
        for name in mask:
            for part in ("weight", "bias"):
                mine, theirs = (getattr(m.get_submodule(name), part, None) for m in (base, merged))
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs), name


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_tied_modules_move_apart_and_are_tied_again(family):
    base, donor = build_relatives(family)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head.weight
    assert embedding.weight is tied
    mask = ChannelMask({"lm_head": [3, 5]}, {"lm_head": head.weight.shape[0]})
    before = state_bytes(base)
    with moves_of(base, donor, [mask]) as moves:
        moves.move_(0, 1.0)
        assert embedding.weight is tied
        assert state_bytes(base)["lm_head.weight"] != before["lm_head.weight"]
        torch.testing.assert_close(head.weight[3], donor.get_output_embeddings().weight[3])
        assert embedding.weight[3].ne(donor.get_input_embeddings().weight[3]).any()
        assert head.weight.requires_grad
    assert head.weight is embedding.weight is tied
    assert state_bytes(base) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_exception_between_two_writes(family, error, monkeypatch):
    base, donor = build_relatives(family)
    before, masks = state_bytes(base), nested_masks(base, (0.2, 0.5))
    write, calls = rowmoves._copy, []

    def interrupted(rows, index, values):
        calls.append(index)
        if len(calls) == 5:
            monkeypatch.undo()
            raise error
        write(rows, index, values)

    moves = moves_of(base, donor, masks)
    monkeypatch.setattr(rowmoves, "_copy", interrupted)
    with pytest.raises(error), moves:
        moves.move_(1, 0.5)
    assert len(calls) == 5
    assert state_bytes(base) == before


def test_moving_on_after_an_interrupted_write(monkeypatch):
    base, donor = build_relatives("llama")
    masks = nested_masks(base, (0.2, 0.5))

    def broken(rows, index, values):
        raise KeyboardInterrupt

    with moves_of(base, donor, masks) as moves:
        moves.move_(1, 0.5)
        monkeypatch.setattr(rowmoves, "_copy", broken)
        with pytest.raises(KeyboardInterrupt):
            moves.move_(0, 0.7)
        monkeypatch.undo()
        moves.move_(0, 0.5)
        for name, expected in expected_rows("llama", torch.float32, masks[0], 0.5).items():
            owner, _, part = name.rpartition(".")
            assert torch.equal(getattr(base.get_submodule(owner), part), expected), name


def test_ties_survive_an_exception_at_the_entrance(monkeypatch):
    base, donor = build_relatives("gemma")
    moves = moves_of(base, donor, [random_mask(base, 0.5)])
    tied = base.lm_head.weight
    made = []

    def parameter(*args, **options):
        if made:
            raise MemoryError
        made.append(args)
        return nn.parameter.Parameter(*args, **options)

    monkeypatch.setattr("act_peft.transfer.in_place.nn.Parameter", parameter)
    with pytest.raises(MemoryError), moves:
        pass
    assert base.lm_head.weight is base.model.embed_tokens.weight is tied


def test_a_pending_graph_may_still_go_backward():
    base, donor = build_relatives("llama")
    loss = base(torch.tensor([[3, 4, 5]])).logits.sum()
    with moves_of(base, donor, [random_mask(base, 0.5)]) as moves, torch.no_grad():
        moves.move_(0, 1.0)
    loss.backward()
    assert base.lm_head.weight.grad is not None


def test_channels_beyond_the_donors_vocabulary_stay():
    base, donor = build("llama", vocab_size=50), build("llama", seed=1)
    mask = ChannelMask({"lm_head": [1, 47, 48, 49]}, {"lm_head": 50})
    with moves_of(base, donor, [mask]) as moves:
        before = base.lm_head.weight.detach().clone()
        moves.move_(0, 1.0)
        assert base.lm_head.weight.ne(before).any(1).nonzero().flatten().tolist() == [1, 47]
    assert moves.num_channels == (2,)


def test_masks_that_are_not_nested():
    base, donor = build_relatives("llama")
    masks = [ChannelMask({"lm_head": channels}, {"lm_head": 48}) for channels in ([1, 2], [2, 3])]
    with pytest.raises(ActValueError, match="1 channels of mask 0 are not in the next one, expected nested masks"):
        moves_of(base, donor, masks)
