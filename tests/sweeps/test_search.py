"""Sweeps of fits and of rules of weights."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from act_peft import ActTypeError, ActValueError, fit, sweep
from act_peft.sweeps.heldout import HeldOutData
from act_peft.sweeps.methods import Method
from act_peft.sweeps.search import TOKENS
from tests.support.tiny_models import build, build_relatives, state_bytes
from tests.sweeps.test_sweep import ABILITY, KEEP, batches_of, naive, random_scores

TO_FIT, TO_KEEP = batches_of(11), batches_of(12)
FEW = {"scales": (0.3, 0.6), "densities": (0.3,), "keep_weights": (0.5, 2.0), "ranks": (2,)}
MANY = batches_of(1, count=12)  # so many samples that the noise is small
FITS = ("fitted", "fitted-rows", "fitted-rank")


def quick(base, donor, scores=None, ability=ABILITY, **settings):
    given = {**FEW, "fit_ability_dataloader": TO_FIT, "fit_keep_dataloader": TO_KEEP, **settings}
    return sweep(base, donor, scores, ability, KEEP, show_progress=False, **given)


def answers_of(donor, batches):
    """The same batches with the donor's own answers, so that there is something to gain."""
    found = []
    for batch in batches:
        with torch.no_grad():
            right = donor(input_ids=batch["input_ids"]).logits.argmax(-1)[:, :-1]
        labels = batch["labels"].clone()
        labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, right)
        found.append({**batch, "labels": labels})
    return found


def assert_measured(row, model):
    for result, batches in ((row.ability, ABILITY), (row.keep["keep"], KEEP)):
        loss, accuracy = naive(model, batches)
        assert result.loss == pytest.approx(loss, rel=2e-5)
        assert result.accuracy == accuracy


def test_fits_are_those_of_fit(family):
    base, donor = build_relatives(family)
    before = state_bytes(base)
    result = quick(base, donor, max_keep_loss=0.1)
    assert state_bytes(base) == before
    rows = [row for row in result.rows if row.method is Method.FITTED]
    assert len(rows) >= 6
    assert len({tuple(row.settings.items()) for row in rows}) == len(rows)
    assert {row.settings["keep_weight"] for row in rows} > {0.5, 2.0}
    for row in rows:
        model = build_relatives(family)[0]
        fit(base, donor, TO_FIT, TO_KEEP, show_progress=False, max_rank=0, **row.settings).add_to_(model)
        assert_measured(row, model)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
def test_rows_and_ranks_are_those_of_adapters(family, tmp_path):
    base, donor = build_relatives(family)
    result = quick(base, donor)
    (rows,) = (row for row in result.rows if row.method is Method.FITTED_ROWS)
    rank, embedding = (row for row in result.rows if row.method is Method.FITTED_RANK)
    settings = {name: rows.settings[name] for name in ("keep_weight", "ridge", "prior_scale")}
    assert dict(rows.settings) == {**settings, "density": 0.3}
    assert dict(rank.settings) == {**settings, "rank": 2, "tokens": TOKENS}
    assert dict(embedding.settings) == {**settings, "rank": 2, "embedding_rank": 2}
    fitted = fit(base, donor, TO_FIT, TO_KEEP, show_progress=False, **settings)
    fitted.to_adapter(fitted.gains.top(0.3, scope="module"), tmp_path / "rows", tokens=0.3)
    fitted.to_lora(2, tmp_path / "rank", norms=True, tokens=TOKENS)
    fitted.to_lora(2, tmp_path / "embedding", norms=True, embedding_rank=2)
    for row, name in ((rows, "rows"), (rank, "rank"), (embedding, "embedding")):
        model = PeftModel.from_pretrained(build_relatives(family)[0], str(tmp_path / name)).eval()
        assert_measured(row, model)
        assert 0 < row.num_channels <= result.rows[0].num_channels


def test_rules_of_weights(family):
    base, donor = build_relatives(family)
    before = state_bytes(base)
    given = {"scales": [0.3, 1.0], "max_keep_loss": 9, "show_progress": False}
    result = sweep(base, donor, None, ABILITY, KEEP, **given)
    assert state_bytes(base) == before
    assert [row.method.value for row in result.rows] == [
        *["interpolation"] * 2,
        *["layer-swap"] * 2,
        *["lines"] * 2,
        *["ties"] * 2,
        *["dare"] * 2,
    ]
    for row in result.rows[:2]:
        model = build_relatives(family)[0]
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), donor.parameters(), strict=True):
                mine += row.transfer_scale * (theirs - mine)
        assert_measured(row, model)
    assert result.rows[1].ability.loss == pytest.approx(result.donor.ability.loss, rel=1e-4)
    swap = result.rows[2]
    assert (swap.density, dict(swap.settings)) == (0.5, {"first": 1, "last": 0})
    assert swap.num_channels < result.rows[0].num_channels


@pytest.mark.parametrize(("limit", "scales"), [(9, []), (-1, [0.2, 0.1]), (0.4, [0.6, 0.5]), (0.65, [0.6, 0.7])])
def test_scales_of_interpolation_close_in_on_the_limit(monkeypatch, limit, scales):
    """With a rise on what is kept that is the scale, and a loss on the ability that falls with it."""
    base, donor = build_relatives("llama")
    limits = lambda rows, base, **_: [row for row in rows if row.transfer_scale <= limit]
    monkeypatch.setattr("act_peft.sweeps.search.allowed_rows", limits)
    monkeypatch.setattr("act_peft.sweeps.search.lowest_loss", lambda rows: max(rows, key=scale_of, default=None))
    given = {"methods": ["interpolation"], "scales": [0.4, 0.8], "show_progress": False}
    result = sweep(base, donor, None, ABILITY, KEEP, **given)
    assert [row.transfer_scale for row in result.rows] == pytest.approx(sorted([0.4, 0.8, *scales]))


def scale_of(row):
    return row.transfer_scale


def test_interpolation_is_a_fit(family):
    """As a fit with a large ridge, so that the command for it makes what was measured."""
    base, donor = build_relatives(family)
    ability = answers_of(donor, MANY)
    result = sweep(base, donor, None, ability, KEEP, methods=["interpolation"], max_keep_loss=10, show_progress=False)
    assert result.recommended.method is Method.INTERPOLATION
    model = build_relatives(family)[0]
    fit(base, donor, TO_FIT, TO_KEEP, show_progress=False, max_rank=0, **result.fit_settings).add_to_(model)
    loss, _ = naive(model, ability)
    assert result.recommended.ability.loss == pytest.approx(loss, rel=2e-5)


def test_autocast_sees_every_change():
    """It keeps casts of the weights, which must not outlive a change."""
    base, donor = build_relatives("llama")
    with torch.autocast("cpu", torch.bfloat16):
        result = quick(base, donor, random_scores(base))
    plain = quick(base, donor, random_scores(base))
    spread = max(row.ability.loss for row in plain.rows) - min(row.ability.loss for row in plain.rows)
    for row, other in zip(result.rows, plain.rows, strict=False):
        if not row.method.is_fitted and row.settings == other.settings:
            assert row.ability.loss == pytest.approx(other.ability.loss, abs=0.1 * spread)
    with torch.autocast("cpu", torch.bfloat16):
        before = sweep(base, donor, None, ABILITY, KEEP, scales=[1.0], methods=["interpolation"], show_progress=False)
    assert before.rows[-1].ability.loss == pytest.approx(before.donor.ability.loss, abs=0.01)


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.05, 1.0])
def test_the_choice_is_never_worse_than_interpolation(limit):
    base, donor = build_relatives("llama")
    result = quick(base, donor, ability=answers_of(donor, MANY), max_keep_loss=limit)
    best = result.recommended
    allowed = [row for row in result.rows if row.keep_rise(result.base) <= limit]
    others = [row.ability.loss for row in allowed if row.method is Method.INTERPOLATION]
    if best is None:
        assert limit < 1
        with pytest.raises(ActValueError, match=r"recommendation: got none of .* \(allow a larger max_keep_loss, or"):
            _ = result.fit_settings
    else:
        assert best in allowed
        assert best.ability.loss <= min([*others, result.base.ability.loss])


def test_everything_in_one_table(tmp_path):
    base, donor = build_relatives("llama")
    scores, ability = random_scores(base), answers_of(donor, ABILITY)
    result = quick(base, donor, scores, ability=ability, max_keep_loss=5.0)
    assert [row.method for row in result.rows[:2]] == [Method.CHANNELS] * 2
    assert {row.method for row in result.rows} == set(Method) - {Method.BASE}
    assert result.max_drop is None
    assert result.max_keep_loss == 5.0
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["base"]["method"] == "base"
    one = plain["rows"][-1]
    assert one["method"] == "fitted-rank"
    assert one["settings"]["rank"] == 2
    assert one["ability"]["num_tokens"] == HeldOutData(ABILITY, argument="").num_tokens
    assert one["against_base"]["ability"]["loss"] == pytest.approx(
        one["ability"]["loss"] - plain["base"]["ability"]["loss"]
    )
    assert one["against_base"]["keep"]["keep"]["standard_error"] > 0
    lines = str(result).splitlines()
    assert lines[0] == f"token accuracy and loss on held-out data, {len(result.rows)} settings, scope global"
    assert lines[1].startswith(f"ability {one['ability']['num_tokens']} tokens, standard error of the base's loss 0.")
    assert lines[3].split() == ["method", "setting", "channels", "ability", "loss", "keep", "loss", "rise"]
    assert "by more than 5 nats per token; a simpler one if" in lines[-2]
    assert lines[-1].startswith("its losses against the base's: ability -")
    best = result.recommended
    assert best.title in repr(result)
    if best.method is not Method.CHANNELS:
        with pytest.raises(ActValueError, match=r"mask: got the recommendation .*, expected channels by scores"):
            _ = result.mask


def test_scored_channels_by_loss():
    base, donor = build_relatives("llama")
    ability = answers_of(donor, MANY)
    given = {"densities": [1.0], "scales": [1.0], "max_keep_loss": 10, "show_progress": False}
    result = sweep(base, donor, random_scores(base), ability, KEEP, **given)
    assert result.mask == result.masks[1.0]
    with pytest.raises(ActValueError, match="fit_settings: got the recommendation density 1, scale 1, expected a fit"):
        _ = result.fit_settings


def test_accuracy_decides_where_it_is_asked_for():
    base, donor = build_relatives("llama")
    result = sweep(base, donor, None, ABILITY, KEEP, scales=[0.3], max_drop=1.0, show_progress=False)
    assert result.max_keep_loss is None
    assert "accuracy" in result.rule


def test_passes_and_solves():
    """The models read what is fitted on once; then a setting costs one pass over the held-out data."""
    base, donor = build_relatives("llama")
    passes = {"base": 0, "donor": 0}
    for name, model in (("base", base), ("donor", donor)):
        model.register_forward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    result = quick(base, donor)
    held_out, to_fit = len(ABILITY) + len(KEEP), len(TO_FIT)
    assert passes["donor"] == held_out + to_fit
    assert passes["base"] == held_out * (1 + len(result.rows)) + len(TO_KEEP) + 1  # which modules share an input


def test_an_adapter_as_donor(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=0.1)
    adapted = get_peft_model(build("llama"), config)
    adapted.save_pretrained(tmp_path)
    base, merged = build("llama"), adapted.merge_and_unload()
    before = state_bytes(base)
    result, expected = quick(base, str(tmp_path)), quick(base, merged)
    assert state_bytes(base) == before
    assert result.donor.ability.loss == pytest.approx(expected.donor.ability.loss, rel=1e-5)
    for row, other in zip(result.rows[:6], expected.rows[:6], strict=True):
        assert row.ability.loss == pytest.approx(other.ability.loss, rel=1e-4)


def test_several_skills_and_options():
    base, donor = build_relatives("llama")
    keep = {"one": KEEP, "two": batches_of(3)}
    given = {"fit_ability_dataloader": iter(TO_FIT), "fit_keep_dataloader": {"a": TO_KEEP, "b": iter(batches_of(4))}}
    methods = ["fitted", "interpolation"]
    result = sweep(base, donor, None, ABILITY, keep, methods=methods, keep_weights=[1], show_progress=False, **given)
    assert {row.method.value for row in result.rows} == set(methods)
    assert list(result.rows[0].keep) == ["one", "two"]
    both = [*TO_KEEP, *batches_of(4)]
    model = build_relatives("llama")[0]
    row = next(row for row in result.rows if row.method is Method.FITTED)
    fit(base, donor, TO_FIT, both, show_progress=False, max_rank=0, **row.settings).add_to_(model)
    assert row.ability.loss == pytest.approx(naive(model, ABILITY)[0], rel=2e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [6, 30, 60])
def test_an_exception_leaves_the_base_as_it_was(error, when):
    base, donor = build_relatives("gemma")
    before, calls = state_bytes(base), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == when:
            raise error("stop")

    handle = base.register_forward_hook(interrupt)
    base.train()
    with pytest.raises(error, match="stop"):
        quick(base, donor)
    handle.remove()
    assert state_bytes(base) == before
    assert base.training


@pytest.mark.parametrize("methods", [FITS, ["interpolation", "ties", *FITS]])
def test_the_search_keeps_within_the_limit_where_it_can(methods):
    base, donor = build_relatives("llama")
    result = quick(base, donor, ability=answers_of(donor, ABILITY), methods=methods, max_keep_loss=0.0)
    assert {row.method.value for row in result.rows} == set(methods)
    weights = [row.settings["keep_weight"] for row in result.rows if row.method is Method.FITTED]
    assert max(weights) >= 2.0


CASES = (
    ({"methods": "fitted"}, ActTypeError, "methods: got 'fitted', expected a list of methods"),
    ({"methods": ["all"]}, ActValueError, "methods: got 'all', expected one of 'base', 'channels'"),
    ({"methods": ["base", "fitted"]}, ActValueError, "methods: 'base' is measured anyway"),
    ({"methods": ["channels", "fitted"]}, ActValueError, "methods: 'channels' needs scores"),
    ({"methods": ["interpolation"]}, ActValueError, "methods: 'fitted' is missing, but there are data to fit on"),
    (
        {"methods": ["fitted"], "fit_ability_dataloader": None, "fit_keep_dataloader": None},
        ActValueError,
        "methods: 'fitted' needs data to fit on, expected fit_ability_dataloader",
    ),
    ({"fit_keep_dataloader": None}, ActValueError, "fit_keep_dataloader: got None, expected batches to fit on"),
    ({"fit_ability_dataloader": ABILITY}, ActValueError, "fit_ability_dataloader: got the held-out batches"),
    ({"fit_keep_dataloader": {"a": KEEP}}, ActValueError, "fit_keep_dataloader: got the held-out batches"),
    ({"fit_keep_dataloader": 3}, ActTypeError, "fit_keep_dataloader: got int, expected an iterable of batches"),
    ({"fit_ability_dataloader": []}, ActValueError, "fit_ability_dataloader: got no batch, expected at least one"),
    ({"max_drop": 0.1, "max_keep_loss": 0.1}, ActValueError, "max_drop: got 0.1 beside max_keep_loss, expected one"),
    ({"max_keep_loss": -1}, ActValueError, "max_keep_loss: got -1, expected a finite number of at least 0"),
    ({"keep_weights": [0]}, ActValueError, "keep_weights: got 0, expected a finite number above 0"),
    ({"ranks": [0]}, ActValueError, "ranks: got 0, expected an integer of at least 1"),
    ({"ranks": "16"}, ActTypeError, "ranks: got '16', expected a list of integers"),
    (
        {"methods": ["fitted"]},
        ActValueError,
        r"ranks: got \(2,\), but 'fitted-rank' is not among the methods, expected none",
    ),
)


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_bad_input(changes, error, message):
    base, donor = build_relatives("llama")
    before = state_bytes(base)
    with pytest.raises(error, match=message):
        quick(base, donor, **changes)
    assert state_bytes(base) == before


def test_no_methods_and_scores_without_channels():
    base, donor = build_relatives("llama")
    with pytest.raises(ActValueError, match="methods: got none, expected at least one"):
        sweep(base, donor, None, ABILITY, KEEP, methods=[])
    with pytest.raises(ActValueError, match="methods: 'channels' is missing, but there are scores, expected it"):
        sweep(base, donor, random_scores(base), ABILITY, KEEP, methods=["ties"])


def test_a_checkpoint_is_no_donor_for_rules_of_weights(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    with pytest.raises(ActValueError, match=r"has no adapter_config.json, expected the folder or Hub id"):
        sweep(base, str(tmp_path), None, ABILITY, KEEP)
