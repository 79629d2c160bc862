"""Which inputs count, and inputs that cannot be read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from act_peft import fit
from act_peft.errors import ActTypeError, ActValueError
from act_peft.fitting.collection import Collector, Positions, counted_tokens, shared_inputs
from act_peft.fitting.pair import find_pairs
from act_peft.localization.vocabulary import CommonVocabulary
from tests.fitting.conftest import batches, relatives
from tests.fitting.test_pair import Toy

ABILITY, KEEP = batches(seed=0), batches(seed=10)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_inputs_are_shared_where_the_tensor_is_the_same() -> None:
    base, _ = relatives("llama")
    with torch.no_grad():
        leaders = shared_inputs(base, ABILITY[0], linear_modules(base))
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            assert leaders[f"{prefix}.self_attn.{name}"] == f"{prefix}.self_attn.q_proj"
        assert leaders[f"{prefix}.mlp.up_proj"] == f"{prefix}.mlp.gate_proj"
        assert leaders[f"{prefix}.mlp.down_proj"] == f"{prefix}.mlp.down_proj"
        assert leaders[f"{prefix}.self_attn.o_proj"] == f"{prefix}.self_attn.o_proj"
    assert leaders["lm_head"] == "lm_head"


def test_an_input_that_was_written_to_is_another() -> None:
    class Writing(Toy):
        def forward(self, input_ids, attention_mask=None):
            x = self.embedding(input_ids)
            first = self.first(x)
            x.add_(1)
            return self.head(first + self.second(x))

    toy = Writing()
    with torch.no_grad():
        leaders = shared_inputs(toy, ABILITY[0], linear_modules(toy))
        assert leaders["second"] == "second"


def test_shared_inputs_are_kept_once() -> None:
    base, donor = relatives("llama")
    pairs = find_pairs(base, [donor])
    with torch.no_grad():
        modules = {pair.linear: base.get_submodule(pair.linear) for pair in pairs if pair.linear}
        leaders = shared_inputs(base, ABILITY[0], modules)
        collector = Collector(pairs, leaders, num_donors=1, positions=Positions.ALL)
        collector.read(donor, 0, ABILITY, CommonVocabulary(base, donor), argument="data", show_progress=False)
    moments = collector.moments()
    attention = "model.layers.0.self_attn"
    assert moments.linear[f"{attention}.q_proj"] is moments.linear[f"{attention}.v_proj"]
    assert len({id(found) for found in moments.linear.values()}) == 2 * 4 + 1
    assert moments.num_tokens == (36, 0)


def test_which_tokens_count() -> None:
    (batch, _) = batches(seed=0, labels=True)
    assert len(counted_tokens(batch, Positions.ALL)) == 18
    assert len(counted_tokens(batch, Positions.ANSWER)) == 9
    assert len(counted_tokens({"input_ids": batch["input_ids"]}, Positions.ALL)) == 21


def test_a_module_that_does_not_run() -> None:
    class Idle(Toy):
        def forward(self, input_ids, attention_mask=None):
            return self.head(self.first(self.embedding(input_ids)))

    with pytest.raises(ActValueError, match="second: did not run, expected every module to run on every batch"):
        fit(Idle(), Idle(), ABILITY, KEEP)


def test_an_embedding_that_does_not_run() -> None:
    class Vectors(Toy):
        def forward(self, inputs_embeds, attention_mask=None):
            return self.head(self.first(inputs_embeds) + self.second(inputs_embeds))

    data = [{"inputs_embeds": torch.randn(2, 3, 4)}]
    with pytest.raises(ActValueError, match=r"embedding: no token of the ability's data reaches it.*exclude_modules"):
        fit(Vectors(), Vectors(), data, data)
    assert set(fit(Vectors(), Vectors(), data, data, exclude_modules=["embedding"]).modules) == {
        "first",
        "second",
        "head",
    }


def test_inputs_without_a_row_for_every_token() -> None:
    class Pooled(Toy):
        def forward(self, input_ids, attention_mask=None):
            return self.head(
                self.first(self.embedding(input_ids)).mean(1) + self.second(self.embedding(input_ids)).mean(1)
            )

    with pytest.raises(ActValueError, match=r"batch 0: head: got an input of shape \[3, 4\], expected one row of"):
        fit(Pooled(), Pooled(), ABILITY, KEEP)


def test_inputs_by_name() -> None:
    class Named(Toy):
        def forward(self, input_ids, attention_mask=None):
            x = self.embedding(input_ids)
            return self.head(self.first(input=x) + self.second(x))

    with pytest.raises(ActValueError, match="first: got an input of type NoneType, expected a tensor"):
        fit(Named(), Named(), ABILITY, KEEP)


def test_ids_without_a_row_for_every_token() -> None:
    class Shifted(Toy):
        def forward(self, input_ids, attention_mask=None):
            x = self.embedding(input_ids[:, 1:])
            x = torch.cat((x[:, :1], x), 1)
            return self.head(self.first(x) + self.second(x))

    with pytest.raises(
        ActValueError, match=r"embedding: got an input \[3, 6\], expected one id for each of the 3 x 7"
    ):
        fit(Shifted(), Shifted(), ABILITY, KEEP)


def test_batches_that_are_none() -> None:
    base, donor = relatives("llama")
    with pytest.raises(ActTypeError, match="got str, expected a dict of tensors"):
        fit(base, donor, ["text"], KEEP)


@pytest.mark.parametrize("smaller", [0, 1])
def test_tokens_that_one_model_does_not_know(smaller: int) -> None:
    base, donor = models = relatives("gemma")
    models[smaller].resize_token_embeddings(40, mean_resizing=False)
    with pytest.raises(ActValueError, match=r"input_ids: got token \d+, expected tokens below 40, which both"):
        fit(base, donor, ABILITY, KEEP)
