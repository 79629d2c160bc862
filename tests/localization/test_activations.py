import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from act_peft.channels.kinds import channel_kind
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.localization import localize
from tests.support.pairs import localize_every

FAMILIES = ["llama", "qwen2", "gpt2", "gemma3"]
# Scores of float32 models against sums in float64 over the same float32 activations: only the difference is rounded.
ORACLE = {"rtol": 1e-6, "atol": 1e-9}
# The same tokens in other batches: matrix products of other shapes round differently.
REBATCHED = {"rtol": 1e-3, "atol": 1e-5}


def assert_scores_close(got, expected, **tolerance):
    assert list(got) == list(expected)
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def oracle(base, donor, batches):
    """The paper's equation as a loop over modules, samples, tokens and channels; one whole output per sample."""
    outputs = ({}, {})
    for model, out in zip((base, donor), outputs, strict=True):
        handles = [
            module.register_forward_hook(
                lambda _, __, y, name=name, out=out: out.setdefault(name, []).append(y.double())
            )
            for name, module in model.named_modules()
            if channel_kind(module) is not None
        ]
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
    scores = {}
    for name in (name for name, _ in base.named_modules() if name in outputs[0]):
        total, count = None, 0
        for number, batch in enumerate(batches):
            one, other = (out[name][number] for out in outputs)
            size, length = batch["labels"].shape
            for b in range(size):
                for t in range(length):
                    if batch["labels"][b, t] == -100:
                        continue
                    count += 1
                    if one.dim() == 4:  # [B, heads, T, C]
                        difference = (
                            sum(abs(other[b, h, t] - one[b, h, t]) for h in range(one.shape[1])) / one.shape[1]
                        )
                    else:
                        row = b if one.shape[0] == size else 0
                        difference = torch.stack([abs(other[row, t, i] - one[row, t, i]) for i in range(one.shape[2])])
                    total = difference if total is None else total + difference
        scores[name] = total / count
    return scores, count


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_equation(family, pair, batches):
    base, donor = pair(family)
    expected, count = oracle(base, donor, batches)
    scores = localize_every(base, donor, batches)
    assert scores.num_tokens == count == sum(int((b["labels"] != -100).sum()) for b in batches)
    assert_scores_close(scores, expected, **ORACLE)
    assert all((values > 0).all() for values in scores.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_module_can_be_a_candidate(family, pair, batches):
    base, donor = pair(family)
    names = set(localize_every(base, donor, batches))
    assert names == {name for name, module in base.named_modules() if channel_kind(module) is not None}
    assert "lm_head" in names
    assert any("norm" in name or "ln_" in name for name in names)
    assert any(name.endswith(("embed_tokens", "wte")) for name in names)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batch_size_padding_side_and_order_do_not_matter(family, side, size, pair, samples, collate):
    base, donor = pair(family)
    alone = localize_every(base, donor, [collate([sample]) for sample in samples])
    shuffled = [samples[i] for i in (3, 0, 5, 1, 4, 2)]
    together = localize_every(base, donor, [collate(shuffled[i : i + size], side) for i in range(0, 6, size)])
    assert together.num_tokens == alone.num_tokens
    assert_scores_close(together, alone, **REBATCHED)


def test_two_halves_added_equal_the_whole(pair, batches):
    base, donor = pair()
    halves = localize_every(base, donor, batches[:1]) + localize_every(base, donor, batches[1:])
    whole = localize_every(base, donor, batches)
    assert halves.num_tokens == whole.num_tokens
    assert_scores_close(halves, whole, rtol=1e-14, atol=0)


def test_packed_batches_without_attention_mask(pair, samples, collate):
    base, donor = pair()
    packed = {
        "input_ids": torch.cat([ids for ids, _ in samples])[None],
        "labels": torch.cat([labels for _, labels in samples])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None],
    }
    alone = localize_every(base, donor, [collate([sample]) for sample in samples])
    assert_scores_close(localize_every(base, donor, [packed]), alone, **REBATCHED)


def test_as_many_heads_as_tokens(pair, samples, collate):
    base, donor = pair("gemma3")  # 4 query heads, 2 key heads
    for length in (4, 2):
        cut = [(ids[:length], ids[:length]) for ids, _ in samples]
        batch = collate(cut)
        assert_scores_close(localize_every(base, donor, [batch]), oracle(base, donor, [batch])[0], **ORACLE)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_models_of_different_dtypes(dtypes, toy, batches):
    base, donor = toy()
    base.to(dtypes[0]), donor.to(dtypes[1])
    ids = torch.cat([b["input_ids"][b["labels"] != -100] for b in batches])
    difference = donor.embed.weight.detach()[ids].double() - base.embed.weight.detach()[ids].double()
    scores = localize(base, donor, batches, target_modules=["embed"])
    torch.testing.assert_close(scores["embed"], difference.abs().mean(0), **ORACLE)


def test_a_model_does_not_differ_from_itself(pair, batches):
    base, _ = pair()
    with pytest.warns(ActWarning, match="all scores are 0: donor and base are equal"):
        scores = localize(base, base, batches)
    assert all(torch.equal(values, torch.zeros_like(values)) for values in scores.values())


def test_names_that_match_nothing_are_said(pair, batches):
    base, donor = pair()
    expected = localize(base, donor, batches, exclude_modules=["embed_tokens"])
    with pytest.warns(
        ActWarning, match=r"exclude_modules: \['embed_token', 'foo'\] match no module that has channels"
    ):
        assert localize(base, donor, batches, exclude_modules=["foo", "embed_token", "embed_tokens"]) == expected
    with pytest.warns(ActWarning, match=r"target_modules: \['q_projs'\] match no module"):
        localize(base, donor, batches, target_modules=["q_projs", "v_proj"])


def test_batch_encodings_and_dataloaders(pair, samples, collate, batches):
    base, donor = pair()
    expected = localize(base, donor, batches)
    assert localize(base, donor, [BatchEncoding(b) for b in batches]) == expected
    assert localize(base, donor, DataLoader(samples, batch_size=2, collate_fn=collate)) == expected
    assert localize(base, donor, (b for b in batches), show_progress=False) == expected


def test_what_the_models_receive(toy, batches):
    base, donor = toy()
    seen = []
    for model in (base, donor):
        model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    localize(base, donor, [{**batches[0], "num_items_in_batch": 3, "extra": [1]}])
    assert seen == [["attention_mask", "extra", "input_ids"]] * 2


def test_models_that_know_caches_run_without(pair, batches):
    base, donor = pair()
    caches = []
    for model in (base, donor):
        model.register_forward_hook(lambda _, __, output: caches.append(output.past_key_values))
    localize(base, donor, batches[:1])
    assert caches == [None, None]


def test_a_module_called_twice_counts_every_token_once(toy, batches):
    shared = toy(lambda self, h: self.mid(self.mid(h)), mid=lambda: nn.Linear(6, 6))
    apart = toy(
        lambda self, h: self.second(self.first(h)), first=lambda: nn.Linear(6, 6), second=lambda: nn.Linear(6, 6)
    )
    for one, two in zip(shared, apart, strict=True):
        two.embed, two.head, two.first = one.embed, one.head, one.mid
        two.second.load_state_dict(one.mid.state_dict())
    scores, expected = localize(*shared, batches), localize(*apart, batches)
    assert scores.num_tokens == expected.num_tokens
    torch.testing.assert_close(scores["mid"], (expected["first"] + expected["second"]) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["q_proj"], None, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (r".*\.1\.mlp\.(up|down)_proj", None, ["1.mlp.up_proj", "1.mlp.down_proj"]),
        (["mlp.up_proj", "mlp.gate_proj"], r".*\.0\..*", ["1.mlp.gate_proj", "1.mlp.up_proj"]),
        (["norm", "lm_head"], ["lm_head"], ["norm"]),
    ],
)
def test_candidates_are_narrowed_as_in_peft(target, exclude, expected, pair, batches):
    base, donor = pair()
    scores = localize_every(base, donor, batches[:1], target_modules=target, exclude_modules=exclude)
    assert [name.removeprefix("model.").removeprefix("layers.") for name in scores] == expected
    whole = localize_every(base, donor, batches[:1])
    assert all(torch.equal(scores[name], whole[name]) for name in scores)


@pytest.fixture
def mixed(pair):
    """A pair in mixed modes, with gradients, frozen parameters and hooks of the user's."""
    base, donor = pair()
    for model in (base, donor):
        model.train()
        model.model.layers[0].eval()
        model.model.norm.requires_grad_(False)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        model.model.norm.register_forward_hook(lambda *_: None)
        model.model.norm.register_forward_pre_hook(lambda *_: None)
    return base, donor


def state(models):
    """Everything that must come back, in a form that can be compared."""
    return [
        (
            name,
            module.training,
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
            [
                (p.requires_grad, p.grad is not None, p._version, p.data_ptr())
                for p in module.parameters(recurse=False)
            ],
        )
        for model in models
        for name, module in model.named_modules()
    ] + [torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_models_come_back_as_they_were(mixed, samples, collate):
    before = state(mixed)
    grad = mixed[0].lm_head.weight.grad.clone()
    localize_every(*mixed, DataLoader(samples, batch_size=2, shuffle=True, collate_fn=collate))
    assert state(mixed) == before
    assert torch.equal(mixed[0].lm_head.weight.grad, grad)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["base", "donor", "data"])
def test_models_come_back_after_a_failure(mixed, batches, error, where):
    def fail(*_):
        raise error

    if where != "data":
        mixed[where == "donor"].model.layers[1].mlp.register_forward_hook(fail)

    def read():
        yield batches[0]
        fail()

    before = state(mixed)
    with pytest.raises(type(error)):
        localize_every(*mixed, read() if where == "data" else batches)
    assert state(mixed) == before


def test_models_run_in_evaluation_mode(toy, batches):
    base, donor = toy(lambda self, h: self.drop(h), drop=lambda: nn.Dropout(0.5))
    base.train(), donor.eval()
    expected = localize(base.eval(), donor, batches)
    assert localize(base.train(), donor.train(), batches) == expected


def test_hooks_of_the_user_are_seen(toy, batches):
    base, donor = toy()
    before = localize_every(base, donor, batches)
    donor.embed.register_forward_hook(lambda _, __, output: output + 100)
    torch.testing.assert_close(
        localize_every(base, donor, batches)["embed"].mean(), torch.tensor(100.0).double(), atol=3, rtol=0
    )
    assert localize_every(base, donor, batches) != before


def test_progress_is_shown_on_a_terminal_only(toy, batches, capsys, monkeypatch):
    base, donor = toy()
    localize(base, donor, batches)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    localize(base, donor, batches, show_progress=False)
    assert capsys.readouterr().err == ""
    localize(base, donor, batches)
    assert "localize" in capsys.readouterr().err


def test_structure_is_checked_before_anything_runs(pair, batches):
    base, donor = pair()
    base.register_forward_pre_hook(lambda *_: pytest.fail("the base ran"))
    donor.model.layers[1].mlp.up_proj = nn.Linear(16, 20)
    with pytest.raises(
        ActValueError,
        match=r"layers.1.mlp.up_proj: donor has 20 channels \(weight \[20, 16\]\), the base has 24 .*\(1 of 19 m",
    ):
        localize(base, donor, batches)


def test_no_batch(toy):
    with pytest.raises(ActValueError, match=r"dataloader: got no batch, expected at least one"):
        localize(*toy(), [])


def test_a_batch_without_answer_token(toy, batches):
    silent = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    with pytest.raises(ActValueError, match=r"batch 1: got no answer token among .* generation markers"):
        localize(*toy(), [batches[0], silent])


def test_a_batch_that_is_no_dict(toy, batches):
    with pytest.raises(ActTypeError, match=r"batch 0: got list, expected a dict of tensors"):
        localize(*toy(), [[1, 2]])
    with pytest.raises(ActTypeError, match=r"batch 0: got str, expected a dict .* put a single batch into a list"):
        localize(*toy(), batches[0])


def test_activations_that_are_not_finite(toy, batches):
    base, donor = toy()
    with torch.no_grad():
        donor.head.bias[2] = float("inf")
    with pytest.raises(
        ActValueError, match=r"batch 0: head: got activations whose difference is not finite .*\(1 of 2"
    ):
        localize_every(base, donor, batches)


def test_a_module_that_sees_other_tokens(toy, batches):
    base, donor = toy(lambda self, h: (self.expert(h[:, :2]), h)[1], expert=lambda: nn.Linear(6, 6))
    with pytest.raises(
        ActValueError, match=r"batch 0: expert: got an output of shape \[2, 2, 6\].*exclude_modules=\['expert'\]"
    ):
        localize(base, donor, batches)
    assert "expert" not in localize(base, donor, batches, exclude_modules=["expert"])


def test_a_module_that_does_not_run(toy, batches):
    with pytest.raises(
        ActValueError, match=r"batch 0: unused: did not run in the base.*\(1 of 2 .*exclude_modules=\['unused'\]"
    ):
        localize(*toy(unused=lambda: nn.Linear(6, 6)), batches)


def test_standard_errors_do_not_depend_on_the_batches(pair, samples, collate):
    base, donor = pair("gemma3")  # its query and key norms see a token once for each head
    one_by_one = [localize_every(base, donor, [collate([sample])], show_progress=False) for sample in samples]
    sums = {name: torch.stack([s[name] * s.num_tokens for s in one_by_one]) for name in one_by_one[0]}  # [G, C]
    counts = torch.tensor([s.num_tokens for s in one_by_one]).double()
    for size, side in ((1, "right"), (4, "left"), (6, "right")):
        batches = [collate(samples[i : i + size], side) for i in range(0, len(samples), size)]
        scores = localize_every(base, donor, batches, show_progress=False)
        assert scores.num_samples == len(samples)
        for name, errors in scores.standard_errors.items():
            rest = sums[name] - counts[:, None] * scores[name]
            expected = (rest.square().sum(0) * len(samples) / (len(samples) - 1)).sqrt() / counts.sum()
            torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-6)
