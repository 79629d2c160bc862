"""Architectures of transformers: what works with a model in memory works from its files, with the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from act_peft import (
    ActConfig,
    ActTypeError,
    ActValueError,
    ChannelMask,
    create_adapter,
    export_lora,
    initialize_from_donor,
    merge_checkpoint,
)
from act_peft.channels.kinds import ChannelKind, channel_kind
from tests.support.architectures import ARCHITECTURES, PAGE, Architecture, page_with_summary
from tests.support.tiny_models import candidates
from tests.support.versions import skip_as_older

CASES = [pytest.param(one, id=one.model, marks=() if one.fast else pytest.mark.slow) for one in ARCHITECTURES]
FACTORED = (ChannelKind.LINEAR, ChannelKind.CONV1D, ChannelKind.EMBEDDING)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def relatives(architecture: Architecture) -> tuple[nn.Module, nn.Module]:
    base = architecture.build(0)
    donor = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return base, donor


def dotted(ends) -> tuple[str, ...]:
    return tuple(f".{end}" for end in ends)


def selected(model: nn.Module, architecture: Architecture, density: float) -> ChannelMask:
    """This share of the channels of every module that can be adapted."""
    generator = torch.Generator().manual_seed(0)
    counts = {n: c for n, c in candidates(model).items() if not f".{n}".endswith(dotted(architecture.refused))}
    return ChannelMask(
        {n: torch.randperm(c, generator=generator)[: max(1, round(density * c))] for n, c in counts.items()}, counts
    )


def equal(left: nn.Module, right: nn.Module) -> None:
    mine, theirs = left.state_dict(), right.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def pair(request, tmp_path):
    architecture = request.param
    if not hasattr(transformers, architecture.model):
        skip_as_older("transformers", f"has no {architecture.model}")
    base, donor = relatives(architecture)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    return architecture, donor


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_files_are_as_good_as_models_in_memory(pair, tmp_path):
    architecture, _ = pair

    def load(name="base"):
        return architecture.model_class.from_pretrained(tmp_path / name).eval()

    mask = selected(load(), architecture, 0.3)
    # A donor's folder is the donor in memory.
    model = get_peft_model(load(), ActConfig(channels=mask, transfer_scale=0.5))
    initialize_from_donor(model, load("donor"))
    model.save_pretrained(tmp_path / "memory")
    get_peft_model(
        load(), ActConfig(channels=mask, donor=str(tmp_path / "donor"), transfer_scale=0.5)
    ).save_pretrained(tmp_path / "folder")
    in_memory = adapter(tmp_path / "memory")
    assert all(torch.equal(t, in_memory[n]) for n, t in adapter(tmp_path / "folder").items())
    # create_adapter writes the same tensors.
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "made", transfer_scale=0.5)
    assert (tmp_path / "made/adapter_model.safetensors").read_bytes() == (
        tmp_path / "folder/adapter_model.safetensors"
    ).read_bytes()
    # Merged on disk is merged in memory, before and after saving.
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    merge_checkpoint(tmp_path / "base", tmp_path / "memory", tmp_path / "merged")
    equal(load("merged"), merged)
    equal(load("saved"), merged)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_everything_of_the_donor_is_the_donor(pair, tmp_path):
    architecture, _ = pair
    base = architecture.model_class.from_pretrained(tmp_path / "base")
    mask = selected(base, architecture, 1.0)
    create_adapter(tmp_path / "base", tmp_path / "donor", mask, tmp_path / "all", transfer_scale=1.0)
    merge_checkpoint(tmp_path / "base", tmp_path / "all", tmp_path / "merged")
    merged = architecture.model_class.from_pretrained(tmp_path / "merged").state_dict()
    theirs = architecture.model_class.from_pretrained(tmp_path / "donor").state_dict()
    for name in mask:
        for part in ("weight", "bias"):
            if f"{name}.{part}" in theirs:
                torch.testing.assert_close(merged[f"{name}.{part}"], theirs[f"{name}.{part}"])


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_stock_peft_reads_the_export(pair, tmp_path):
    architecture, donor = pair

    def load():
        return architecture.model_class.from_pretrained(tmp_path / "base").eval()

    mask = selected(load(), architecture, 0.2)
    kinds = {name: channel_kind(module) for name, module in load().named_modules()}
    channels = {
        name: index.tolist()
        for name, index in mask.items()
        if kinds[name] in FACTORED and not f".{name}".endswith(dotted(architecture.not_exported))
    }
    model = get_peft_model(load(), ActConfig(channels=channels))
    initialize_from_donor(model, donor, transfer_scale=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "act_delta_bias" in name:
                parameter.zero_()
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(), tmp_path / "lora")
    for name in channels:
        theirs, mine = (one.get_base_model().get_submodule(name).get_delta_weight("default") for one in (lora, model))
        torch.testing.assert_close(theirs, mine, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pair", [case for case in CASES if case.values[0].refused], indirect=True)
def test_what_cannot_be_adapted_is_refused_by_name(pair, tmp_path):
    architecture, _ = pair
    model = architecture.model_class.from_pretrained(tmp_path / "base")
    for part, sentence in architecture.refused.items():
        name = next(name for name in candidates(model) if f".{name}".endswith(f".{part}"))
        with pytest.raises((ActValueError, ActTypeError), match=rf"{name}: .*{sentence}"):
            get_peft_model(model, ActConfig(channels={name: [0]}))
        with pytest.raises((ActValueError, ActTypeError), match=rf"{name}: .*{sentence}"):
            create_adapter(tmp_path / "base", tmp_path / "donor", {name: [0]}, tmp_path / "out")


def test_the_page_shows_the_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page_with_summary(page) == page, "run python -m tests.support.architectures"


def test_the_table_is_wide_enough():
    assert len({one.model for one in ARCHITECTURES}) == len(ARCHITECTURES) >= 40
