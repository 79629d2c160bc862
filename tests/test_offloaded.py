"""Bases that accelerate keeps in CPU memory or on the disk: the same results as in memory, or one sentence."""

from __future__ import annotations

import copy
import hashlib
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from act_peft import (
    ActConfig,
    ActLoadError,
    ActValueError,
    ActWarning,
    FittedTransfer,
    create_adapter,
    fit,
    initialize_from_donor,
    localize,
    sweep,
)
from act_peft.offloading import values_of
from tests.support.tiny_models import batch, build, build_relatives

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT
    pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings=True.:UserWarning"),  # PEFT merges anyway
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]
CHANNELS = {"q_proj": [0, 1], "lm_head": [3], "input_layernorm": [2]}
DATA = [{"input_ids": batch(), "attention_mask": torch.ones_like(batch()), "labels": batch()}]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """Base and donor, and an adapter of the base."""
    folder = tmp_path_factory.mktemp("offloaded")
    for name, model in zip(
        ("base", "donor"), build_relatives("qwen2", tie_word_embeddings=request.param), strict=True
    ):
        model.save_pretrained(folder / name)
    create_adapter(folder / "base", folder / "donor", CHANNELS, folder / "adapter", transfer_scale=1.0)
    return folder


def load(path, **settings):
    return AutoModelForCausalLM.from_pretrained(path, **settings)


def device_map(path):
    """Part of the model on the disk, as `device_map="auto"` does it where memory is short."""
    on_disk = {"model.layers.1"} if load(path).config.tie_word_embeddings else {"model.layers.1", "lm_head"}
    modules = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return {name: "disk" if name in on_disk else "cpu" for name in modules}


BASES = {
    "CPU memory": lambda path, scratch: cpu_offload(load(path), execution_device="cpu"),
    "disk": lambda path, scratch: disk_offload(load(path), scratch / "offloaded", execution_device="cpu"),
    "device map": lambda path, scratch: load(path, device_map=device_map(path), offload_folder=scratch / "offloaded"),
}


@pytest.fixture(params=["CPU memory", pytest.param("disk", marks=pytest.mark.slow), "device map"])
def offloaded(request, folder, tmp_path):
    """Makes a base of which at least a part is not in memory."""

    def make(name="base"):
        model = BASES[request.param](folder / name, tmp_path / name)
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
        return model

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(batch()).logits


def adapted(base, folder, **changes):
    settings = {"channels": CHANNELS, "donor": str(folder / "donor"), "transfer_scale": 1.0, **changes}
    return get_peft_model(base, ActConfig(**settings, task_type="CAUSAL_LM"))


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def deltas(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".act_delta_" in name}


def test_a_transfer_reads_the_base_where_it_is(folder, offloaded):
    model, expected = adapted(offloaded(), folder), adapted(load(folder / "base"), folder)
    equal(deltas(model), deltas(expected))
    assert model.peft_config["default"].adapted_modules == expected.peft_config["default"].adapted_modules
    assert torch.equal(logits(model), logits(expected))


def test_a_donor_in_memory_may_be_offloaded_too(folder, offloaded):
    model = adapted(load(folder / "base"), folder, donor=None)
    initialize_from_donor(model, offloaded("donor"), transfer_scale=1.0)
    equal(deltas(model), deltas(adapted(load(folder / "base"), folder)))


def test_scores_by_weights_are_those_in_memory(folder, offloaded):
    base, donor = load(folder / "base"), load(folder / "donor")
    expected = localize(base, donor, None, score="weight", show_progress=False)
    equal(localize(offloaded(), donor, None, score="weight", show_progress=False), expected)
    equal(localize(base, offloaded("donor"), None, score="weight", show_progress=False), expected)


def test_merging_and_unmerging_give_the_bits_of_memory(folder, offloaded):
    model, expected, base = adapted(offloaded(), folder), adapted(load(folder / "base"), folder), load(folder / "base")
    before = logits(model)
    for each in (model, expected):
        each.merge_adapter()
    assert torch.equal(logits(model), logits(expected))
    for each in (model, expected):
        each.base_model.set_scale("default", -2.0)
    assert torch.equal(logits(model), logits(expected))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.base_model.set_scale("default", 1.0)
    assert torch.equal(logits(model), before)


def test_a_merged_model_says_whether_its_weights_are_tied(folder, offloaded):
    for channels in (CHANNELS, {"q_proj": [0]}):
        merged, expected = (
            adapted(base, folder, channels=channels).merge_and_unload(safe_merge=True)
            for base in (offloaded(), load(folder / "base"))
        )
        assert torch.equal(logits(merged), logits(expected))
        assert merged.config.tie_word_embeddings == expected.config.tie_word_embeddings


def test_a_model_may_be_offloaded_with_its_adapter(folder, tmp_path):
    model = PeftModel.from_pretrained(load(folder / "base"), folder / "adapter")
    expected = logits(model)
    assert torch.equal(logits(cpu_offload(model, execution_device="cpu")), expected)


@pytest.mark.parametrize("how", ["PEFT", "transformers"])
def test_loading_on_a_base_that_a_device_map_offloads_is_refused_before_files_are_written(
    how, folder, tmp_path, monkeypatch
):
    """PEFT writes the base's file anew, at the relative path that the base was loaded from."""
    monkeypatch.chdir(folder)
    before = hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()
    base = load("base", device_map=device_map("base"), offload_folder=tmp_path)
    places = {f"base_model.model.{name}": place for name, place in device_map("base").items()}
    loaders = {
        "PEFT": lambda: PeftModel.from_pretrained(base, "adapter", device_map=places, offload_folder=str(tmp_path)),
        "transformers": lambda: base.load_adapter("adapter"),
    }
    with pytest.raises(ActLoadError, match=r"layers.1.*is offloaded by device_map, .*merge_checkpoint"):
        loaders[how]()
    assert hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest() == before


def test_loading_on_other_offloaded_bases_works_and_compares_the_base(folder, tmp_path):
    expected = logits(PeftModel.from_pretrained(load(folder / "base"), folder / "adapter"))
    for name in ("CPU memory", "disk"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ActWarning)
            model = PeftModel.from_pretrained(BASES[name](folder / "base", tmp_path / "base"), folder / "adapter")
        assert torch.equal(logits(model), expected)
    with pytest.warns(ActWarning, match="made for a base with other weights"):
        PeftModel.from_pretrained(cpu_offload(load(folder / "donor"), execution_device="cpu"), folder / "adapter")


@pytest.fixture(scope="module")
def fitted(folder) -> FittedTransfer:
    return fit(load(folder / "base"), load(folder / "donor"), DATA, DATA, target_modules=["q_proj", "v_proj"])


REFUSED = {
    "fit": (lambda base, donor, fitted: fit(base, donor, DATA, DATA), "weight has no data in memory"),
    "fit, the donor": (lambda base, donor, fitted: fit(donor, base, DATA, DATA), "the donor's weight has no data"),
    "sweep": (
        lambda base, donor, fitted: sweep(base, donor, localize(base, donor, DATA, show_progress=False), DATA, DATA),
        "its weight is offloaded",
    ),
    "adding a fit": (lambda base, donor, fitted: fitted.add_to_(base), r"q_proj: its weight is offloaded"),
    "attribution": (
        lambda base, donor, fitted: localize(base, donor, DATA, score="attribution", show_progress=False),
        "accelerate does that",
    ),
}


@pytest.mark.parametrize("step", REFUSED)
def test_what_needs_the_weights_in_memory_says_so(step, folder, offloaded, fitted):
    run, match = REFUSED[step]
    with pytest.raises(ActValueError, match=match):
        run(offloaded(), load(folder / "donor"), fitted)


def test_a_fit_fills_an_adapter_of_an_offloaded_base(folder, offloaded, fitted):
    channels = {"q_proj": [0, 1]}
    models = [adapted(base, folder, channels=channels, donor=None) for base in (offloaded(), load(folder / "base"))]
    for model in models:
        fitted.apply_to(model)
    equal(*(deltas(model) for model in models))


def test_a_model_without_data_anywhere_says_so(folder):
    empty = copy.deepcopy(build("qwen2")).to("meta")
    with pytest.raises(ActValueError, match=r"its weight has no data \(device meta\), expected a loaded model"):
        adapted(empty, folder)
    with pytest.raises(ActValueError, match=r"^head: its weight has no data"):
        values_of(empty.lm_head, "weight", name="head")
