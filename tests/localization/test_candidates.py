import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from act_peft.errors import ActValueError
from act_peft.localization.candidates import find_candidates, left_out_by_default


def test_all_linear_leaves_the_output_layer_out(pair):
    base, donor = pair()
    expected = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(expected) == 14
    for word in ("all-linear", "ALL-LINEAR"):
        assert list(find_candidates(base, donor, target_modules=word).base) == expected
    without = find_candidates(base, donor, target_modules="all-linear", exclude_modules=["down_proj"])
    assert list(without.base) == [name for name in expected if "down_proj" not in name]


def test_all_linear_knows_conv1d_and_models_without_output_layer(pair, toy):
    assert len(find_candidates(*pair("gpt2"), target_modules="all-linear").base) == 8
    assert list(find_candidates(*toy(), target_modules="all-linear").base) == ["head"]


def test_what_is_found(toy):
    base, donor = toy(mid=lambda: nn.Linear(6, 7), act=lambda: nn.ReLU(), group=lambda: nn.GroupNorm(2, 6))
    found = find_candidates(base, donor)
    assert found.num_channels == {"mid": 7, "head": 5}
    assert found.base == {"mid": base.mid, "head": base.head}
    assert found.donor == {"mid": donor.mid, "head": donor.head}
    assert found.embeddings == frozenset()
    assert find_candidates(base, donor, target_modules=".*").embeddings == {"embed"}


class TestLeftOutByDefault:
    """The output layer and embeddings are candidates only where they are named."""

    @pytest.mark.parametrize(
        ("family", "left_out"),
        [
            ("llama", ["model.embed_tokens", "lm_head"]),
            ("gemma3", ["model.embed_tokens", "lm_head"]),  # tied
            ("gpt2", ["transformer.wte", "transformer.wpe", "lm_head"]),  # tied, with positions
        ],
    )
    def test_language_models(self, family, left_out, pair):
        base, donor = pair(family)
        assert left_out_by_default(base) == left_out
        every = list(find_candidates(base, donor, target_modules=".*").base)
        assert list(find_candidates(base, donor).base) == [name for name in every if name not in left_out]

    @pytest.mark.parametrize(
        "target", [["lm_head", "embed_tokens"], ["model.embed_tokens", "lm_head"], r"lm_head|.*\.embed_tokens"]
    )
    def test_whoever_names_them_gets_them(self, target, pair):
        found = find_candidates(*pair(), target_modules=target)
        assert list(found.base) == ["model.embed_tokens", "lm_head"]
        without = find_candidates(*pair(), target_modules=target, exclude_modules=["lm_head"])
        assert list(without.base) == ["model.embed_tokens"]

    def test_adapters_do_not_hide_them(self, pair):
        config = LoraConfig(target_modules=["lm_head", "embed_tokens", "q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(pair()[0], config)
        assert left_out_by_default(model) == left_out_by_default(model.get_base_model())
        assert left_out_by_default(model) == ["model.embed_tokens", "lm_head"]

    def test_a_model_that_says_that_it_has_no_output_layer(self, toy, monkeypatch):
        base, _ = toy(mid=lambda: nn.Linear(6, 40))

        def unknown():
            raise NotImplementedError("no head")  # what a model may say that has the method of a parent class

        for getter in (unknown, lambda: None):
            monkeypatch.setattr(base, "get_output_embeddings", getter, raising=False)
            assert left_out_by_default(base) == ["embed"]
        monkeypatch.setattr(base, "get_output_embeddings", lambda: base.mid)
        assert left_out_by_default(base) == ["embed", "mid"]

    def test_a_plain_module_with_a_channel_for_every_token(self, toy):
        base, _ = toy()
        assert left_out_by_default(base) == ["embed"]  # the last linear module has 5 channels
        base.head = nn.Linear(6, base.embed.num_embeddings)
        assert left_out_by_default(base) == ["embed", "head"]
        base.after = nn.Linear(6, 6)
        assert left_out_by_default(base) == ["embed"]  # no longer the last one

    def test_a_plain_module_that_ties_its_weights(self, toy):
        base, _ = toy(after=lambda: nn.Linear(6, 6))
        base.head = nn.Linear(6, base.embed.num_embeddings, bias=False)
        base.head.weight = base.embed.weight
        assert left_out_by_default(base) == ["embed", "head"]

    def test_a_module_without_embeddings(self):
        assert left_out_by_default(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))) == []


@pytest.mark.parametrize(("target", "exclude"), [(["nothing"], None), (None, ".*"), ("mid", ["mid"])])
def test_nothing_left(toy, target, exclude):
    with pytest.raises(
        ActValueError, match=r"target_modules: got .* leaves no module .*\(the base has: embed, head\)"
    ):
        find_candidates(*toy(), target_modules=target, exclude_modules=exclude)


def test_a_module_that_only_one_model_has(toy):
    base, donor = toy()
    donor.extra = nn.Linear(6, 3)
    with pytest.raises(
        ActValueError, match=r"extra: donor has 3 channels \(weight \[3, 6\]\), the base has no such module"
    ):
        find_candidates(base, donor)
    with pytest.raises(
        ActValueError, match=r"extra: donor has no such module, the base has 3 .*\(1 of 2 modules differ"
    ):
        find_candidates(donor, base)
    assert list(find_candidates(base, donor, exclude_modules=["extra"]).base) == ["head"]


def test_other_numbers_of_channels(toy):
    base, donor = toy()
    donor.head = nn.Linear(6, 9)
    with pytest.raises(
        ActValueError,
        match=r"head: donor has 9 channels \(weight \[9, 6\]\), the base has 5 channels \(weight \[5, 6\]\) \(1 of 1",
    ):
        find_candidates(base, donor)
