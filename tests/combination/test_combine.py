"""Combining adapters: a model against the sum of its adapters, folders against the model, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from act_peft import ActConfig, ActLoadError, ActTypeError, ActValueError, combine, find_conflicts
from act_peft.disk import folders
from act_peft.layers import ActLayer
from tests.support.tiny_checkpoints import change_adapter, save_adapter, save_relatives
from tests.support.tiny_models import batch, build, random_mask, state_bytes

pytestmark = [
    # Two of the families tie their embeddings and the masks cover every module.
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]

NAMES = ("z", "x", "y")
WEIGHTS = (0.3, -1.0, 0.7)
TYPES = {
    "linear": {},
    "sum": {},
    "mean": {},
    "first": {},
    "larger": {},
    "ties": {"density": 0.4, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "magnitude_prune": {"density": 0.4},
}


def stacked(family, *, dtype=torch.float32, density=0.4):
    """A model with three random adapters whose channels overlap."""
    model = None
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        base = build(family, dtype=dtype) if model is None else model.get_base_model()
        mask = random_mask(build(family), density, seed=seed)
        config = ActConfig(channels=mask, init_weights=False, task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def layers_of(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, ActLayer)}


def contributions(layer):
    """Channel -> the (weight, weight's delta, bias's delta or None) of its adapters, by loops in float64."""
    found = {}
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        index = layer.act_delta_index[name].tolist()
        rows = layer.act_delta_weight[name].detach().double().movedim(layer.kind.channel_dim, 0)
        for k, channel in enumerate(index):
            bias = layer.act_delta_bias[name][k].item() if layer.has_bias else None
            found.setdefault(channel, []).append((weight, rows[k], bias))
    return found


def larger(owners):
    def size(owner):
        weight, row, bias = owner
        return weight**2 * (float(row.square().sum()) + (0.0 if bias is None else bias**2))

    return [max(owners, key=size)]


RULES = {
    "linear": (lambda owners: owners, False),
    "mean": (lambda owners: owners, True),
    "first": (lambda owners: owners[:1], False),
    "larger": (larger, False),
}


def test_every_channel_of_every_kind_of_module(family):
    model = stacked(family)
    for name in RULES:
        model.add_weighted_adapter(list(NAMES), list(WEIGHTS), f"new_{name}", name)
    for layer in layers_of(model).values():
        for name in RULES:
            assert_rule(layer, name)


def assert_rule(layer, name):
    chosen, divided = RULES[name]
    expected = contributions(layer)
    assert layer.act_delta_index[f"new_{name}"].tolist() == sorted(expected)
    rows = layer.act_delta_weight[f"new_{name}"].detach().movedim(layer.kind.channel_dim, 0)
    owners = [chosen(expected[channel]) for channel in sorted(expected)]
    shares = [1 / len(those) if divided else 1.0 for those in owners]
    wanted = [share * sum(w * row for w, row, _ in those) for share, those in zip(shares, owners, strict=True)]
    torch.testing.assert_close(rows, torch.stack(wanted).float())
    if layer.has_bias:
        wanted = [share * sum(w * b for w, _, b in those) for share, those in zip(shares, owners, strict=True)]
        torch.testing.assert_close(layer.act_delta_bias[f"new_{name}"].detach(), torch.tensor(wanted))


def outputs(model, adapters):
    model.base_model.set_adapter(adapters)
    with torch.no_grad():
        return model(batch()).logits


def test_it_does_what_its_parts_do_together_with_these_scales(family):
    model = stacked(family)
    model.set_scale("x", 2.0)
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "new")
    combined = outputs(model, ["new"])
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        model.set_scale(name, weight * (2.0 if name == "x" else 1.0))
    together = outputs(model, list(NAMES))
    # Through all layers of a model whose random deltas make outputs of some hundreds.
    torch.testing.assert_close(combined, together, rtol=1e-3, atol=1e-3 * float(together.abs().max()))
    assert not torch.allclose(combined, outputs(model, ["z"]), rtol=0.1)


def test_merged_it_is_the_sum_within_one_rounding(family, dtype):
    model = stacked(family, dtype=dtype)
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "new")
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        model.set_scale(name, weight)
    for layer in layers_of(model).values():
        original = layer.get_base_layer().weight.detach().clone()
        dense = sum(layer.get_delta_weight(name).double() for name in NAMES)
        layer.merge(adapter_names=["new"])
        merged = layer.get_base_layer().weight.detach().double()
        # One rounding of the weight, and those of three float32 products and their sums.
        size = original.double().abs() + sum(layer.get_delta_weight(name).double().abs() for name in NAMES)
        rounding = torch.finfo(dtype).eps * merged.abs() + 4 * torch.finfo(torch.float32).eps * size
        assert ((merged - (original.double() + dense)).abs() <= rounding).all()
        layer.unmerge()
        assert torch.equal(layer.get_base_layer().weight, original)


def test_the_new_adapter_waits_as_in_lora():
    model = stacked("llama")
    model.base_model.set_adapter(["z", "y"])
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = state_bytes(model)
    expected = model(batch()).logits
    model.add_weighted_adapter(["z", "x"], [1.0, 1.0], "new")
    assert model.active_adapters == ["z", "y"]
    after = dict(model.named_parameters())
    assert {name: after[name].requires_grad for name in trains} == trains
    assert not any(parameter.requires_grad for name, parameter in after.items() if name.endswith(".new"))
    assert {name: tensor for name, tensor in state_bytes(model).items() if not name.endswith(".new")} == before
    assert torch.equal(model(batch()).logits, expected)
    model.set_adapter("new")
    model(batch()).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "weight.new" in n and "lm_head" in n)


def test_merged_adapters_are_unmerged_first_as_peft_does():
    model, merged = stacked("qwen2"), stacked("qwen2")
    model.add_weighted_adapter(["z", "x"], [1.0, 0.5], "new")
    merged.base_model.merge_adapter(["z", "x"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        merged.add_weighted_adapter(["z", "x"], [1.0, 0.5], "new")
    assert state_bytes(merged) == state_bytes(model)
    assert model.peft_config["new"].adapted_modules == merged.peft_config["new"].adapted_modules
    for name, layer in layers_of(model).items():
        other = layers_of(merged)[name]
        assert torch.equal(layer.act_delta_weight["new"], other.act_delta_weight["new"])


def test_base_deltas_of_the_base_s_dtype_become_float32():
    base = build("llama", dtype=torch.bfloat16)
    config = ActConfig(channels={"q_proj": [1, 2]}, init_weights=False)
    model = get_peft_model(base, config, adapter_name="z", autocast_adapter_dtype=False)
    layer = next(iter(layers_of(model).values()))
    assert layer.act_delta_weight["z"].dtype == torch.bfloat16
    model.add_weighted_adapter(["z", "z"], [0.3, 0.1], "new")
    assert layer.act_delta_weight["new"].dtype == torch.float32
    torch.testing.assert_close(layer.act_delta_weight["new"].detach(), layer.act_delta_weight["z"].float() * 0.4)


class Nested(nn.Module):
    """A module whose name is the end of another one's."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.block = nn.ModuleDict({"lin": nn.Linear(3, 3)})

    def forward(self, x):
        return self.block["lin"](self.lin(x))


def test_a_module_whose_name_ends_another_s_stays_alone():
    model = get_peft_model(
        Nested(),
        ActConfig(channels={"lin": [0]}, exclude_modules=["block.lin"], init_weights=False),
        adapter_name="z",
    )
    assert set(layers_of(model)) == {"lin"}
    model.add_weighted_adapter(["z"], [2.0], "new")
    assert set(layers_of(model)) == {"lin"}
    assert set(model.peft_config["new"].adapted_modules) == {"lin"}


def refused_in_memory(
    match, error, *, model, adapters=("z", "x"), weights=(1.0, 1.0), name="new", combination_type="linear"
):
    before, structure = state_bytes(model), [n for n, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        model.add_weighted_adapter(adapters, weights, name, combination_type)
    assert state_bytes(model) == before
    assert [n for n, _ in model.named_modules()] == structure
    assert set(model.peft_config) == {"z", "x", "y"}


def test_bad_arguments_leave_the_model_as_it_was():
    model = stacked("llama")
    for match, error, arguments in (
        (r"adapters: got 'w', expected some of \['x', 'y', 'z'\]", ActValueError, {"adapters": ("z", "w")}),
        ("adapters: got 'zx', expected a list", ActTypeError, {"adapters": "zx"}),
        ("adapters: got .*, expected a list with the names of at least", ActTypeError, {"adapters": ()}),
        ("weights: got 1, expected one for each of the 2", ActValueError, {"weights": (1.0,)}),
        ("weights: got nan, expected a finite", ActValueError, {"weights": (1.0, float("nan"))}),
        ("adapter_name: got 'y', which the model has", ActValueError, {"name": "y"}),
        ("adapter_name: got 'a.b', expected a name without dots", ActValueError, {"name": "a.b"}),
        ("adapter_name: got None", ActValueError, {"name": None}),
        ("got 'svd', which combines the factors of LoRA", ActValueError, {"combination_type": "svd"}),
    ):
        refused_in_memory(match, error, model=model, **arguments)


def test_broken_deltas_are_refused_before_anything_changes():
    model = stacked("llama")
    layers_of(model)["lm_head"].act_delta_weight["x"].data[1, 2] = float("nan")
    refused_in_memory("lm_head: the deltas of x hold NaN or infinity", ActValueError, model=model)
    model = stacked("llama")
    layers_of(model)["lm_head"].act_delta_weight["x"].data.fill_(3e38)
    match = "lm_head: the combined deltas hold NaN or infinity"
    refused_in_memory(match, ActValueError, model=model, weights=(1.0, 10.0))


def test_a_failure_on_the_way_takes_everything_back(monkeypatch):
    model = stacked("llama")
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def fail(*_args, **_settings):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model.base_model), "_fill", fail)
    refused_in_memory("no memory", RuntimeError, model=model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains


def test_modules_that_an_adapter_saves_as_a_whole_are_refused():
    model = get_peft_model(
        build("llama"),
        ActConfig(channels={"q_proj": [1]}, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        adapter_name="z",
    )
    with pytest.raises(ActValueError, match=r"adapters: 'z' holds lm_head.*, expected channel deltas only"):
        model.add_weighted_adapter(["z"], [1.0], "new")
    assert set(model.peft_config) == {"z"}


# --------------------------------------------------------------------------------------------------------- on disk ---


def saved(tmp_path, family, dtype=torch.float32):
    """Base and three adapters in folders; the adapters' folders by name."""
    save_relatives(tmp_path, family, dtype=dtype)
    adapters = {name: tmp_path / name for name in NAMES}
    for seed, folder in enumerate(adapters.values()):
        save_adapter(folder, family, dtype=dtype, seed=seed, density=0.4)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    return adapters


def loaded(base, adapters):
    model = None
    for name, folder in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    return model


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def stack(request, tmp_path_factory):
    """A folder with base and adapters, and a model with these adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, loaded(build(request.param), saved(folder, request.param))


@pytest.mark.parametrize("name", TYPES)
def test_the_files_are_those_of_memory_byte_for_byte(stack, tmp_path, name):
    folder, model = stack
    torch.manual_seed(5)
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), f"new_{name}", name, **TYPES[name])
    model.save_pretrained(tmp_path, selected_adapters=[f"new_{name}"])
    torch.manual_seed(5)
    combine(
        {name: folder / name for name in NAMES},
        tmp_path / "disk",
        weights=WEIGHTS,
        combination_type=name,
        base=folder / "base",
        **TYPES[name],
    )
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / f"new_{name}" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float32), ("gemma", torch.float32)]
)
def test_the_result_loads_and_is_that_of_memory(family, dtype, tmp_path):
    adapters = saved(tmp_path, family, dtype)
    weights = dict(zip(NAMES, WEIGHTS, strict=True))
    result = combine(adapters, tmp_path / "out", weights=weights)
    model = loaded(build(family, dtype=dtype), {**adapters, "new": tmp_path / "out"})
    assert result.num_modules == len(layers_of(model))
    assert result.num_channels == sum(layer.act_delta_index["new"].numel() for layer in layers_of(model).values())
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "memory")
    for layer in layers_of(model).values():
        assert torch.equal(layer.act_delta_index["new"], layer.act_delta_index["memory"])
        assert torch.equal(layer.act_delta_weight["new"], layer.act_delta_weight["memory"])
        if layer.has_bias:
            assert torch.equal(layer.act_delta_bias["new"], layer.act_delta_bias["memory"])


def test_the_order_of_the_sum_does_not_matter(tmp_path):
    adapters = saved(tmp_path, "llama")
    folders_ = list(adapters.values())
    combine(folders_, tmp_path / "a", weights=WEIGHTS)
    combine(folders_[::-1], tmp_path / "b", weights=WEIGHTS[::-1])
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_deltas_of_several_dtypes(tmp_path):
    adapters = saved(tmp_path, "qwen2")
    wide = "base_model.model.model.layers.0.self_attn.q_proj.act_delta_"
    for part in ("weight", "bias"):
        change_adapter(adapters["x"], wide + part, lambda t: t.double())
        change_adapter(adapters["y"], wide.replace("q_proj", "k_proj") + part, lambda t: t.bfloat16())
    combine(adapters, tmp_path / "out", weights=WEIGHTS)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        wanted = torch.int64 if key.endswith("index") else torch.float64 if "0.self_attn.q_proj" in key else None
        assert tensor.dtype == (wanted or torch.float32), key


def test_card_and_configuration_say_what_it_is(tmp_path):
    adapters = saved(tmp_path, "llama")
    combine(adapters, tmp_path / "out", weights=WEIGHTS, combination_type="ties", density=0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "## ACT adapter" in card
    assert "Combination type `ties`, density 0.5" in card
    assert "| x | -1 |  | 0.4 |" in card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["donor"], config["transfer_scale"]) == (None, 0.4)


def test_different_donors_are_nobody_s_donor(tmp_path):
    adapters = saved(tmp_path, "llama")
    for name, donor in (("z", "org/one"), ("x", "org/two"), ("y", "org/two")):
        path = adapters[name] / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "donor": donor}))
    combine(adapters, tmp_path / "out")
    combine([adapters["x"], adapters["y"]], tmp_path / "same")
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("out", "same")]
    assert [(c["donor"], c["transfer_scale"]) for c in configs] == [(None, 1.0), ("org/two", 0.4)]
    assert "| z | 1 | org/one | 0.4 |" in (tmp_path / "out" / "README.md").read_text()
    model = loaded(build("llama"), {"x": adapters["x"], "y": adapters["y"]})
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new")  # and nobody opens org/two
    assert model.peft_config["new"].donor == "org/two"


def refused(tmp_path, match, error=ActValueError, **arguments):
    arguments = {"adapters": [tmp_path / "z", tmp_path / "x"], "output_dir": tmp_path / "out", **arguments}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=match):
        combine(arguments.pop("adapters"), arguments.pop("output_dir"), **arguments)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_bad_arguments_write_nothing(tmp_path, monkeypatch):
    saved(tmp_path, "llama")
    refused(tmp_path, "weights: got 3, expected one for each of the 2", weights=[1, 2, 3])
    refused(tmp_path, "which combines the factors of LoRA", combination_type="cat")
    refused(tmp_path, "density: got none", combination_type="ties")
    refused(tmp_path, "nowhere", adapters=[tmp_path / "nowhere"])
    refused(tmp_path, "is, lies in or holds the input", output_dir=tmp_path / "z" / "out")
    refused(tmp_path, "is, lies in or holds the input", output_dir=tmp_path / "z", overwrite=True)
    refused(tmp_path, "is, lies in or holds the input", output_dir=tmp_path / "base", base=tmp_path / "base")
    (tmp_path / "out").mkdir()
    refused(tmp_path, "out: exists, expected a new folder")
    combine([tmp_path / "z"], tmp_path / "out", overwrite=True)
    combine([tmp_path / "z", tmp_path / "x"], tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(tmp_path, "the disk has 0.00 GB free")


def test_broken_deltas_write_nothing(tmp_path):
    saved(tmp_path, "llama")
    change_adapter(tmp_path / "x", "base_model.model.lm_head.act_delta_weight", lambda t: t / 0)
    refused(tmp_path, "lm_head: the deltas of x hold NaN or infinity")


def test_adapters_of_another_model_write_nothing(tmp_path):
    saved(tmp_path, "llama")
    wider = build("llama", intermediate_size=32)
    config = ActConfig(channels=random_mask(wider, 0.3), init_weights=False)
    get_peft_model(wider, config).save_pretrained(tmp_path / "w")
    refused(tmp_path, "were made for different models", ActLoadError, adapters=[tmp_path / "z", tmp_path / "w"])


# ------------------------------------------------------------------------------------------------------- conflicts ---


def test_conflicts_in_memory_on_disk_and_of_the_combination_are_the_same(tmp_path):
    adapters = saved(tmp_path, "qwen2")
    on_disk = find_conflicts(adapters, weights=WEIGHTS)
    assert find_conflicts(list(NAMES), model=loaded(build("qwen2"), adapters), weights=WEIGHTS) == on_disk
    assert combine(adapters, tmp_path / "out", weights=WEIGHTS).conflicts == on_disk
    assert [total.adapters for total in on_disk.totals] == [("z", "x"), ("z", "y"), ("x", "y")]
    assert find_conflicts(list(NAMES), model=loaded(build("qwen2"), adapters)) == find_conflicts(adapters)


def test_conflicts_count_rows_with_their_biases(tmp_path):
    adapters = saved(tmp_path, "qwen2")
    z, x = (load_file(adapters[name] / "adapter_model.safetensors") for name in ("z", "x"))
    key = "base_model.model.model.layers.1.self_attn.q_proj.act_delta_"
    shared = sorted(set(z[key + "index"].tolist()) & set(x[key + "index"].tolist()))
    rows = []
    for tensors in (z, x):
        where = [tensors[key + "index"].tolist().index(channel) for channel in shared]
        rows.append(torch.cat([tensors[key + "weight"][where], tensors[key + "bias"][where, None]], 1).double())
    report = find_conflicts([adapters["z"], adapters["x"]])
    (found,) = [c for c in report.conflicts if c.module == "model.layers.1.self_attn.q_proj"]
    assert found.shared == len(shared) > 1
    a, b = (tensor.flatten() for tensor in rows)
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    assert found.cancelled == pytest.approx(1 - float((a + b).abs().sum() / (a.abs().sum() + b.abs().sum())))


def test_adapters_of_one_name_are_told_apart_by_their_places(tmp_path):
    for place in ("one", "two"):
        save_adapter(tmp_path / place / "ability")
    report = find_conflicts([tmp_path / "one" / "ability", tmp_path / "two" / "ability"])
    assert report.totals[0].adapters == (str(tmp_path / "one" / "ability"), str(tmp_path / "two" / "ability"))
    assert report.totals[0].cosine == pytest.approx(1.0)


def test_a_model_without_adapters_has_none_to_compare():
    with pytest.raises(ActValueError, match=r"adapters: got 'a', expected some of \[\]"):
        find_conflicts(["a"], model=build("llama"))
