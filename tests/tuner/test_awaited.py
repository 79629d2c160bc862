"""Adapters that transformers' `load_adapter` assigns tensor by tensor: the same checks as everywhere else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from act_peft import ActConfig, ActLoadError, ActValueError, ActWarning
from act_peft.adapter.state import ExpectedState, check_state
from act_peft.doors import HAS_ADAPTERS, READS_FILES
from act_peft.layers.lookup import act_layers
from tests.support.tiny_models import batch, build, state_bytes
from tests.support.versions import skip_as_older

HEAD = "base_model.model.lm_head."
SECOND = "ignore:Already found a `peft_config` attribute"  # PEFT says so of every second adapter
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A base and the folder of an adapter of it."""
    base = build("qwen2")
    channels = {"q_proj": [0, 3, 15], "down_proj": [1], "lm_head": [5, 7, 9], "norm": [5]}
    tuned = get_peft_model(copy.deepcopy(base), ActConfig(channels=channels, init_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def rewrite(folder, part, change):
    tensors = load_file(folder / TENSORS)
    new = change(tensors.pop(HEAD + part))
    save_file(tensors if new is None else {**tensors, HEAD + part: new}, folder / TENSORS, metadata={"format": "pt"})


DAMAGES = {
    "doubled": ("act_delta_index", lambda t: torch.tensor([5, 5, 9]), "from 5 to 9, expected ascending ones"),
    "unsorted": ("act_delta_index", lambda t: t.flip(0), "expected ascending ones"),
    "negative": ("act_delta_index", lambda t: torch.tensor([-1, 7, 9]), "from -1 to 9"),
    "too large": ("act_delta_index", lambda t: t + 40, r"from 45 to 49, expected ascending ones in \[0, 48\)"),
    "huge": ("act_delta_index", lambda t: t * 2**50, r"expected ascending ones in \[0, 48\)"),
    "float": ("act_delta_index", lambda t: t.float(), r"channel indices are torch\.float32"),
    "fractions": ("act_delta_index", lambda t: t + 0.5, r"channel indices are torch\.float32"),
    "fewer channels": ("act_delta_index", lambda t: t[:2], "size mismatch for act_delta_weight"),
    "no index": ("act_delta_index", lambda t: None, "has no act_delta_index"),
    "no weight": ("act_delta_weight", lambda t: None, "has no act_delta_weight"),
    "integers": ("act_delta_weight", lambda t: t.int(), r"act_delta_weight is torch\.int32"),
    "another width": ("act_delta_weight", lambda t: t[:, :3].contiguous(), "has no act_delta_weight"),
}


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_is_as_it_was(saved, what, is_trainable):
    base, folder = saved
    part, change, match = DAMAGES[what]
    whole = (folder / TENSORS).read_bytes()
    rewrite(folder, part, change)
    before, names = state_bytes(base), [name for name, _ in base.named_modules()]
    with pytest.raises(ActLoadError, match=match):
        base.load_adapter(str(folder), is_trainable=is_trainable)
    assert state_bytes(base) == before
    assert [name for name, _ in base.named_modules()] == names
    assert not {"peft_config", HAS_ADAPTERS, READS_FILES} & set(vars(base))
    assert all(parameter.requires_grad for parameter in base.parameters())
    (folder / TENSORS).write_bytes(whole)
    base.load_adapter(str(folder))
    assert not torch.equal(base(batch()).logits, build("qwen2")(batch()).logits)


def test_a_file_that_is_cut_off_is_refused_before_anything_is_assigned(saved):
    base, folder = saved
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])
    with pytest.raises(ActValueError, match="it is cut off or damaged"):
        base.load_adapter(str(folder))
    assert not act_layers(base)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_whole_adapter_is_the_same_as_with_peft(saved, tmp_path, is_trainable):
    base, folder = saved
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folder)(batch()).logits
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(folder), is_trainable=is_trainable)
    assert torch.equal(model(batch()).logits, expected)
    assert READS_FILES not in vars(model)
    assert not any(layer.awaits("default") for layer in act_layers(model).values())


def test_another_base_is_warned_of(saved):
    _, folder = saved
    with pytest.warns(ActWarning, match=r"adapter 'default' was made for a base with other weights: \d of \d modules"):
        build("qwen2", seed=5).load_adapter(str(folder))


@pytest.mark.filterwarnings(SECOND)
def test_a_damaged_second_adapter_leaves_the_first(saved, tmp_path):
    base, folder = saved
    base.load_adapter(str(folder), "first")
    expected = base(batch()).logits
    rewrite(folder, *DAMAGES["doubled"][:2])
    with pytest.raises(ActLoadError, match="expected ascending ones"):
        base.load_adapter(str(folder), "second")
    assert list(base.peft_config) == ["first"]
    base.set_adapter("first")
    if not torch.equal(base(batch()).logits, expected):
        skip_as_older("transformers", "gives other outputs after a second adapter was refused")


def test_an_adapter_without_its_tensors_does_not_run(saved):
    base, folder = saved
    model = inject_adapter_in_model(ActConfig.from_pretrained(str(folder)), base)
    for use in (lambda: model(batch()), lambda: act_layers(model)["lm_head"].merge()):
        with pytest.raises(ActLoadError, match="adapter 'default': its tensors are not loaded, expected them before"):
            use()
    set_peft_model_state_dict(model, load_file(folder / TENSORS))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(batch()).logits, model(batch()).logits)


@pytest.mark.parametrize("part", ["act_delta_index", "act_delta_weight"])
def test_tensors_that_a_state_dict_lacks_are_noticed_before_the_first_forward(saved, part):
    base, folder = saved
    model = inject_adapter_in_model(ActConfig.from_pretrained(str(folder)), base)
    set_peft_model_state_dict(model, {k: v for k, v in load_file(folder / TENSORS).items() if k != HEAD + part})
    with pytest.raises(ActLoadError, match=f"lm_head: the adapter has no {part}"):
        model(batch())
    assert not act_layers(model)
    model(batch())


def test_a_state_dict_on_another_base_is_warned_of_before_the_first_forward(saved):
    _, folder = saved
    model = inject_adapter_in_model(ActConfig.from_pretrained(str(folder)), build("qwen2", seed=5))
    set_peft_model_state_dict(model, load_file(folder / TENSORS))
    with pytest.warns(ActWarning, match="made for a base with other weights"):
        model(batch())


@pytest.mark.filterwarnings(SECOND)
def test_other_active_adapters_run_while_one_is_awaited(saved):
    base, folder = saved
    model = PeftModel.from_pretrained(base, folder)
    expected = model(batch()).logits
    inject_adapter_in_model(ActConfig.from_pretrained(str(folder)), model.get_base_model(), "second")
    model.set_adapter("default")
    assert torch.equal(model(batch()).logits, expected)


def test_the_record_says_which_modules_they_are_whatever_target_modules_says(saved):
    base, folder = saved
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": "x"}))
    base.load_adapter(str(folder))
    assert set(act_layers(base)) == set(config["adapted_modules"])


def test_a_tensor_that_nobody_expects_is_refused():
    state = {"act_delta_index": torch.tensor([0]), "act_delta_other": torch.ones(1)}
    with pytest.raises(ActLoadError, match="x: the adapter has act_delta_other, expected act_delta_index only"):
        check_state(ExpectedState(None, None, {}), state, "x")
