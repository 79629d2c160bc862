"""Paths in files mean the same elsewhere, and a transfer between other models than those of the mask is noticed."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import (
    ActConfig,
    ActValueError,
    ActWarning,
    FittedTransfer,
    create_adapter,
    fit,
    initialize_from_donor,
    localize,
    sweep,
)
from act_peft.cli import main
from tests.support.tiny_checkpoints import save_relatives
from tests.support.tiny_models import batch, build, build_relatives

DATA = [{"input_ids": batch()}]
EXCHANGED = r"is the base, expected the same base .*exchanged"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Base and donor, loaded from relative folders."""
    save_relatives(tmp_path, "llama")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return [AutoModelForCausalLM.from_pretrained(f"../{name}").eval() for name in ("base", "donor")]


def made_mask(base, donor):
    return localize(base, donor, DATA, show_progress=False).top(0.3, scope="module")


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_relative_folders_are_recorded_as_absolute_ones(models, tmp_path):
    base, donor = models
    mask = made_mask(base, donor)
    expected = [str(tmp_path / name) for name in ("base", "donor")]
    assert [mask.origin.base.name, mask.origin.donor.name] == expected
    create_adapter("../base", "../donor", mask, "disk")
    model = get_peft_model(base, ActConfig(channels=mask, donor="../donor", task_type="CAUSAL_LM"))
    model.save_pretrained("memory")
    later = get_peft_model(build_again("../base"), ActConfig(channels=mask, task_type="CAUSAL_LM"))
    initialize_from_donor(later, donor)
    later.save_pretrained("filled")
    fitted = fit(build_again("../base"), donor, DATA, DATA, show_progress=False)
    fitted.save("fitted.safetensors")
    loaded = FittedTransfer.load("fitted.safetensors")
    assert [loaded.record.base, *loaded.record.donors] == expected
    fitted.to_adapter(fitted.gains.top(0.3), "of_fit")
    for name in ("disk", "memory", "filled", "of_fit"):
        written = settings(tmp_path / "work" / name)
        assert [written["base_model_name_or_path"], written["donor"]] == expected
    files = [(tmp_path / "work" / name / "adapter_config.json").read_bytes() for name in ("disk", "memory")]
    assert files[0] == files[1]


def build_again(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_hub_id_stays_a_hub_id(models):
    base, _ = models
    base.name_or_path = base.config._name_or_path = "org/model"
    model = get_peft_model(base, ActConfig(channels={"q_proj": [0]}, task_type="CAUSAL_LM"))
    assert model.peft_config["default"].base_model_name_or_path == "org/model"


def test_what_an_adapter_s_file_says_stays(models, tmp_path):
    base, _ = models
    get_peft_model(base, ActConfig(channels={"q_proj": [0]}, task_type="CAUSAL_LM")).save_pretrained("a")
    path = tmp_path / "work" / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "donor": "../donor"}))
    loaded = PeftModel.from_pretrained(build_again("../base"), "a")
    assert loaded.peft_config["default"].donor == "../donor"


def test_memory_and_disk_take_the_same_fingerprints(family, tmp_path):
    save_relatives(tmp_path, family, dtype=torch.bfloat16)
    base, donor = (AutoModelForCausalLM.from_pretrained(tmp_path / name).float().eval() for name in ("base", "donor"))
    scores = localize(base, donor, score="weight", target_modules=".*")
    assert scores.origin.base.fingerprints.keys() == scores.origin.donor.fingerprints.keys() == set(scores)
    mask = scores.top(0.3, scope="module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "a")
    with pytest.raises(ActValueError, match=EXCHANGED):
        create_adapter(tmp_path / "donor", tmp_path / "base", mask, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_base_and_donor_exchanged_is_an_error_everywhere(models, tmp_path, capsys):
    base, donor = models
    scores = localize(base, donor, DATA, show_progress=False)
    mask = scores.top(0.3, scope="module")
    scores.save("scores.safetensors")
    mask.save("mask.safetensors")
    config = {"channels": "mask.safetensors", "task_type": "CAUSAL_LM"}
    fitted = fit(base, donor, DATA, DATA, show_progress=False)
    backwards = fit(donor, base, DATA, DATA, show_progress=False)
    adapted = get_peft_model(build_again("../donor"), ActConfig(channels={"q_proj": [0]}, task_type="CAUSAL_LM"))
    for step in (
        lambda: create_adapter("../donor", "../base", "mask.safetensors", "out"),
        lambda: get_peft_model(build_again("../donor"), ActConfig(donor="../base", **config)),
        lambda: get_peft_model(build_again("../donor"), ActConfig(**config)),
        lambda: sweep(donor, base, scores, DATA, {"kept": DATA}, densities=[0.3], scales=[0.3], show_progress=False),
        lambda: backwards.to_adapter("mask.safetensors", "out"),
        lambda: fitted.merge("../donor", "out"),
        lambda: fitted.to_adapter(fitted.gains.top(0.3), "out", base="../donor"),
        lambda: fitted.add_to_(donor),
        lambda: fitted.apply_to(adapted),
    ):
        with pytest.raises(ActValueError, match=EXCHANGED):
            step()
    assert not (tmp_path / "work" / "out").exists()
    arguments = ["transfer", "--base", "../donor", "--donor", "../base", "--mask", "mask.safetensors"]
    assert main([*arguments, "--output", "out"]) == 1
    assert "exchanged" in capsys.readouterr().err


def test_a_mask_s_adapter_is_filled_from_its_own_base_only(models):
    base, donor = models
    mask = made_mask(base, donor)
    model = get_peft_model(build_again("../donor"), ActConfig(channels=dict(mask), task_type="CAUSAL_LM"))
    model.peft_config["default"].channels = mask
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ActValueError, match=EXCHANGED):
        initialize_from_donor(model, base)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_models_are_worth_a_warning(models, tmp_path):
    base, donor = models
    mask = made_mask(base, donor)
    other = build("llama", seed=5)
    other.save_pretrained(tmp_path / "other")
    for a, b, role in (("other", "donor", "base"), ("base", "other", "donor")):
        with pytest.warns(ActWarning) as seen:
            create_adapter(tmp_path / a, tmp_path / b, mask, tmp_path / f"of_{a}")
        text = f"the mask was made with a {role} with different weights than {tmp_path / 'other'}: 19 of 19 modules"
        found = [one for one in seen if str(one.message).startswith(text)]
        assert [one.filename for one in found] == [__file__], [str(one.message) for one in seen]
    with pytest.warns(ActWarning, match="the mask was made with a base with different weights") as seen:
        get_peft_model(build("llama", seed=5), ActConfig(channels=mask, task_type="CAUSAL_LM"))
    fitted = fit(base, donor, DATA, DATA, target_modules=list(mask), show_progress=False)
    with pytest.warns(ActWarning, match="the mask was made with a donor with different weights") as seen:
        fitted.to_adapter(made_mask(base, build_relatives("llama", attention_dropout=0.0)[1].apply(shaken)), "fit")
    assert seen[0].filename == __file__


def shaken(module):
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data.mul_(1.1)


def test_adapters_as_donors_are_known_by_name(models, tmp_path):
    base, _ = models
    lora = get_peft_model(build_again("../base"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained("lora")
    mask = localize(base, "lora", DATA, show_progress=False).top(0.3, scope="module")
    assert mask.origin.donor.name == str(tmp_path / "work" / "lora")
    assert not mask.origin.donor.fingerprints
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_adapter("../base", "lora", mask, "out")
    own = localize(lora, lora, DATA, show_progress=False)
    assert own.origin.base.fingerprints == mask.origin.base.fingerprints
    assert not own.origin.donor.fingerprints


def test_a_base_with_merged_adapters_is_still_recognized(models):
    base, donor = models
    mask = made_mask(base, donor)
    channels = {"q_proj": [0], "embed_tokens": [1]}
    model = get_peft_model(base, ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM"))
    model.add_adapter("second", ActConfig(channels=mask, task_type="CAUSAL_LM"))
    model.merge_adapter(["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize_from_donor(model, donor, adapter_name="second")
