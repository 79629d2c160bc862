from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from act_peft import (
    ActConfig,
    ActTypeError,
    ActValueError,
    ActWarning,
    ChannelScores,
    initialize_from_donor,
    localize,
    sweep,
)
from act_peft.sweeps.heldout import HeldOutData
from tests.support.tiny_models import batch, build, build_relatives, candidates, state_bytes

DENSITIES, SCALES = (0.1, 0.3), (0.3, 0.8)


def batches_of(seed, count=2):
    found = []
    for number in range(count):
        ids = batch(rows=3, length=8 + number, seed=10 * seed + number)
        labels = ids.clone()
        labels[:, :4] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


ABILITY, KEEP = batches_of(1), batches_of(2)


def random_scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ChannelScores({n: torch.rand(c, generator=generator) for n, c in candidates(model).items()}, 1)


def naive(model, batches):
    """Loss and accuracy with a loop over tokens in float64."""
    losses, hits = [], []
    for inputs in batches:
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"]).logits.double()
        for sample, labels in zip(logits, inputs["labels"].tolist(), strict=True):
            for position in range(1, len(labels)):
                if labels[position] != -100:
                    row = sample[position - 1].tolist()
                    total = sum(math.exp(value - max(row)) for value in row)
                    losses.append(math.log(total) + max(row) - row[labels[position]])
                    hits.append(row.index(max(row)) == labels[position])
    return sum(losses) / len(losses), sum(hits) / len(hits)


def quick(base, donor, scores=None, **settings):
    settings = {"densities": DENSITIES, "scales": SCALES, "show_progress": False, **settings}
    return sweep(base, donor, random_scores(base) if scores is None else scores, ABILITY, KEEP, **settings)


def assert_result(result, model, batches):
    loss, accuracy = naive(model, batches)
    assert result.loss == pytest.approx(loss, rel=2e-5)
    assert result.accuracy == accuracy


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # PEFT, of tied modules
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("scope", ["global", "module"])
def test_every_setting_is_what_a_merged_adapter_gives(family, scope):
    base, donor = build_relatives(family)
    scores = random_scores(base)
    before = state_bytes(base)
    result = quick(base, donor, scope=scope)
    assert state_bytes(base) == before
    assert [(row.density, row.transfer_scale) for row in result.rows] == [(d, s) for d in DENSITIES for s in SCALES]
    for row in result.rows:
        mask = scores.top(row.density, scope=scope)
        assert row.num_channels == mask.num_selected
        assert result.masks[row.density] == mask
        config = ActConfig(channels=mask, transfer_scale=row.transfer_scale, task_type="CAUSAL_LM")
        adapted = get_peft_model(build_relatives(family)[0], config)
        initialize_from_donor(adapted, donor)
        merged = adapted.merge_and_unload().eval()
        assert_result(row.ability, merged, ABILITY)
        assert_result(row.keep["keep"], merged, KEEP)
    assert_result(result.base.ability, base, ABILITY)
    assert_result(result.base.keep["keep"], base, KEEP)
    assert_result(result.donor.ability, donor, ABILITY)
    assert_result(result.donor.keep["keep"], donor, KEEP)


def test_density_and_scale_one_are_the_donor():
    base, donor = build_relatives("llama")
    result = quick(base, donor, densities=[1.0], scales=[1.0])
    assert result.rows[0].ability.loss == pytest.approx(result.donor.ability.loss, rel=1e-5)


def test_settings_may_come_in_any_order():
    base, donor = build_relatives("llama")
    ordered = quick(base, donor, densities=(0.1, 0.2, 0.3), scales=(0.2, 0.4, 0.6))
    assert quick(base, donor, densities=(0.3, 0.1, 0.2), scales=(0.6, 0.2, 0.4)) == ordered
    alone = [quick(base, donor, densities=[r.density], scales=[r.transfer_scale]).rows[0] for r in ordered.rows]
    assert list(ordered.rows) == alone


def test_several_skills_and_options():
    base, donor = build_relatives("llama")
    scores = random_scores(base)
    other = batches_of(3)
    settings = {"densities": DENSITIES, "scales": SCALES, "show_progress": False, "max_drop": 0.5}
    result = sweep(base, donor, scores, ABILITY, {"one": KEEP, "two": other}, normalize="rms", **settings)
    assert list(result.rows[0].keep) == ["one", "two"]
    assert result.masks[0.1] == scores.top(0.1, normalize="rms") != scores.top(0.1)
    assert_result(result.base.keep["two"], base, other)
    assert result.to_dict()["normalize"] == "rms"
    assert result.max_drop == 0.5


def test_masks_of_one_kind_of_module_are_said_once():
    base, donor = build_relatives("llama")
    loud = {n: v * (100 if n.endswith("down_proj") else 1) for n, v in random_scores(base).items()}
    scores = ChannelScores(loud, 1)
    with pytest.warns(ActWarning) as warned:
        result = sweep(base, donor, scores, ABILITY, KEEP, densities=(0.06, 0.07), scales=[0.5], show_progress=False)
    (message,) = (str(warning.message) for warning in warned)
    assert message.startswith("density 0.06: 100% of the selected channels belong to 'down_proj', which has ")
    assert warned[0].filename == __file__
    assert result.masks[0.06].num_selected > 10
    quick(base, donor, scores, densities=(0.06, 0.07), scope="module")  # no warning


def test_a_generator_does():
    base, donor = build_relatives("llama")
    settings = {"densities": DENSITIES, "scales": SCALES, "show_progress": False}
    result = sweep(base, donor, random_scores(base), iter(ABILITY), iter(KEEP), **settings)
    assert result == quick(base, donor)


def test_a_donor_on_disk(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    result, expected = quick(base, str(tmp_path)), quick(base, donor)
    assert result.donor is None
    assert result.rows == expected.rows
    assert "donor" not in str(result).splitlines()[-4]


def test_a_lora_adapter_as_donor(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=0.1)
    torch.manual_seed(0)
    adapted = get_peft_model(build("llama"), config)
    adapted.save_pretrained(tmp_path)
    base, merged = build("llama"), adapted.merge_and_unload()
    names = [name for name in candidates(base) if name.endswith(("q_proj", "up_proj"))]
    scores = ChannelScores({name: random_scores(base)[name] for name in names}, 1)
    result, expected = quick(base, tmp_path, scores), quick(base, merged, scores)
    for row, other in zip(result.rows, expected.rows, strict=True):
        assert row.ability.loss == pytest.approx(other.ability.loss, rel=1e-5)


def test_the_recommendation_goes_into_a_config():
    base, donor = build_relatives("llama")
    with torch.no_grad():  # answers that the donor gives, so that there is something to gain
        data = [{"input_ids": b["input_ids"], "labels": b["labels"].clone()} for b in ABILITY]
        for inputs in data:
            right = donor(input_ids=inputs["input_ids"]).logits.argmax(-1)[:, :-1]
            inputs["labels"][:, 1:] = torch.where(inputs["labels"][:, 1:] == -100, -100, right)
    result = sweep(base, donor, random_scores(base), data, KEEP, densities=[0.5, 1], scales=[1], show_progress=False)
    assert result.recommended.ability.accuracy > result.base.ability.accuracy
    assert result.donor.ability.accuracy == 1
    model = get_peft_model(base, ActConfig(channels=result.mask, transfer_scale=result.transfer_scale))
    assert model.peft_config["default"].transfer_scale == 1


def test_everything_is_as_before():
    base, donor = build_relatives("llama")
    base.train()
    base.model.layers[0].eval()
    flags = [module.training for module in base.modules()]
    random_state = torch.random.get_rng_state()
    quick(base, donor)
    assert [module.training for module in base.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_exception_leaves_the_base_as_it_was(family, error):
    base, donor = build_relatives(family)
    scores, before = random_scores(base), state_bytes(base)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    calls = []

    def interrupt(module, inputs, output):
        calls.append(state_bytes(base) != before)
        if len(calls) == 11:
            raise error("stop")

    handle = base.register_forward_hook(interrupt)
    base.train()
    with pytest.raises(error, match="stop"):
        quick(base, donor, scores)
    handle.remove()
    assert calls == [False] * 4 + [True] * 7
    assert state_bytes(base) == before
    assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == tied
    assert base.training


def test_as_many_forward_passes_as_promised():
    base, donor = build_relatives("llama")
    passes = {"base": 0, "donor": 0}
    for name, model in (("base", base), ("donor", donor)):
        model.register_forward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    quick(base, donor)
    batches = len(ABILITY) + len(KEEP)
    assert passes == {"base": (1 + len(DENSITIES) * len(SCALES)) * batches, "donor": batches}


def test_a_donor_that_does_not_know_the_tokens_is_not_measured():
    base, donor = build("llama", vocab_size=60), build("llama")
    data = batches_of(1)
    data[0]["input_ids"][0, 0] = 55
    settings = {"densities": [0.1], "scales": [0.5], "show_progress": False}
    scores = ChannelScores({"model.layers.0.mlp.up_proj": torch.rand(24)}, 1)
    with pytest.warns(ActWarning, match="vocabulary has 48 rows"):
        assert sweep(base, donor, scores, data, KEEP, **settings).donor is None
    with pytest.warns(ActWarning, match="vocabulary has 48 rows"):
        assert sweep(base, donor, scores, ABILITY, KEEP, **settings).donor is not None


def test_scores_of_localize_and_the_warning_comes_from_the_call():
    base, donor = build_relatives("llama")
    donor.config.max_position_embeddings = 128
    scores = localize(base, donor, ABILITY, show_progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sweep(base, donor, scores, ABILITY, KEEP, densities=[0.1], scales=[0.5], show_progress=False)
    assert [(w.category, w.filename) for w in caught] == [(ActWarning, __file__)]


class Wrong:
    """Calls that are refused, and why."""

    base, donor = build_relatives("llama")
    scores = random_scores(base)
    cases = (
        ({"base": 3}, ActTypeError, "base: got int, expected a torch.nn.Module"),
        ({"scores": {"a": 1}}, ActTypeError, r"scores: got dict, expected ChannelScores \(from localize\)"),
        ({"donor": 3}, ActTypeError, "donor: got int, expected a model"),
        ({"ability_dataloader": []}, ActValueError, "ability_dataloader: got no batch"),
        ({"ability_dataloader": None}, ActTypeError, "ability_dataloader: got NoneType, expected an iterable"),
        ({"keep_dataloader": None}, ActTypeError, "keep_dataloader 'keep': got NoneType, expected an iterable"),
        ({"keep_dataloader": {"a": KEEP, "b": []}}, ActValueError, "keep_dataloader 'b': got no batch"),
        ({"keep_dataloader": {}}, ActValueError, "keep_dataloader: got no skill, expected at least one"),
        ({"densities": []}, ActValueError, "densities: got none, expected at least one"),
        ({"densities": 0.1}, ActTypeError, r"densities: got 0.1, expected a list of numbers"),
        ({"densities": [0.1, "a"]}, ActTypeError, "densities: got 'a', expected a number above 0 and at most 1"),
        ({"densities": [True]}, ActTypeError, "densities: got True"),
        ({"densities": [0]}, ActValueError, "densities: got 0, expected a number above 0"),
        ({"densities": [1.1]}, ActValueError, "densities: got 1.1, expected a number above 0"),
        ({"densities": [float("nan")]}, ActValueError, "densities: got nan"),
        ({"densities": [1e-6, 0.1]}, ActValueError, r"densities: 1e-06 selects none of \d+ channels"),
        ({"densities": [0.1, 0.2, 0.1]}, ActValueError, "expected each value once"),
        ({"scales": [0.5, 0]}, ActValueError, "scales: got 0, expected a finite number other than 0"),
        ({"scales": [float("inf")]}, ActValueError, "scales: got inf"),
        ({"scales": "0.5"}, ActTypeError, "scales: got '0.5', expected a list"),
        ({"scope": "layer"}, ActValueError, "scope: got 'layer', expected one of 'global', 'module'"),
        ({"normalize": "max"}, ActValueError, "normalize: got 'max', expected one of 'none', 'rms'"),
        ({"max_drop": -0.1}, ActValueError, "max_drop: got -0.1, expected a finite number of at least 0"),
        ({"max_drop": "5%"}, ActTypeError, "max_drop: got '5%'"),
    )


@pytest.mark.parametrize(("changes", "error", "message"), Wrong.cases)
def test_bad_input(changes, error, message):
    arguments = {
        "base": Wrong.base,
        "donor": Wrong.donor,
        "scores": Wrong.scores,
        "ability_dataloader": ABILITY,
        "keep_dataloader": KEEP,
        "densities": [0.1],
        "scales": [0.5],
        **changes,
    }
    before = state_bytes(Wrong.base)
    with pytest.raises(error, match=message):
        sweep(**arguments)
    assert state_bytes(Wrong.base) == before


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_proj"]), PromptTuningConfig(num_virtual_tokens=2)])
def test_a_base_with_adapters(config):
    base, donor = build_relatives("llama")
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base, config)
    with pytest.raises(ActTypeError, match="base: got a PeftModelForCausalLM with adapters in it, expected a plain"):
        quick(model, donor, random_scores(donor))


def test_scores_of_another_model():
    base, donor = build_relatives("llama")
    with pytest.raises(ActValueError, match="lm_head: the scores have 60 channels, the base has 48 channels"):
        quick(base, donor, ChannelScores({"lm_head": torch.rand(60)}, 1))
    with pytest.raises(ActValueError, match="nowhere: the scores have 60 channels, the base has no such module"):
        quick(base, donor, ChannelScores({"nowhere": torch.rand(60)}, 1))
    with pytest.raises(ActValueError, match="model: the scores have 60 channels, the base has no such module"):
        quick(base, donor, ChannelScores({"model": torch.rand(60)}, 1))


def test_an_offloaded_module():
    base, donor = build_relatives("llama")
    scores = random_scores(base)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.to("meta"))
    with pytest.raises(ActValueError, match=r"lm_head: its weight is offloaded \(on the meta device\)"):
        quick(base, donor, scores)


def test_a_broken_donor_is_found_before_anything_runs():
    base, donor = build_relatives("llama")
    with torch.no_grad():
        donor.lm_head.weight[:] = float("nan")
    before = state_bytes(base)
    base.register_forward_hook(lambda *_: pytest.fail("the base ran"))
    with pytest.raises(ActValueError, match="lm_head: the donor's selected weights hold NaN"):
        quick(base, donor)
    assert state_bytes(base) == before


def test_a_setting_that_breaks_the_model_is_a_row_of_the_table():
    base, donor = build_relatives("llama")
    scores = ChannelScores({"lm_head": torch.rand(48)}, 1)
    result = quick(base, donor, scores, densities=[1.0], scales=[1e40])
    assert not math.isfinite(result.rows[0].ability.loss)
    assert result.recommended is not result.rows[0]
    assert result.to_dict()["rows"][0]["ability"]["loss"] is None


def test_the_data_of_the_library_and_of_the_sweep_count_the_same_tokens():
    base, donor = build_relatives("llama")
    assert (
        localize(base, donor, ABILITY, show_progress=False).num_tokens == HeldOutData(ABILITY, argument="").num_tokens
    )
