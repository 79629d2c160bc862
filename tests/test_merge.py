"""Merging on disk against merging in memory, byte by byte, and everything that must be refused before it starts."""

from __future__ import annotations

import json
import os
import random
import shutil
import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

import act_peft
from act_peft import ActConfig, ActLoadError, ActTypeError, ActValueError, ActWarning, merge_checkpoint
from act_peft.disk import shard as shards
from act_peft.merging import writing
from tests.support.killed_runs import contents, slow_runs
from tests.support.tiny_checkpoints import save_adapter, save_relatives
from tests.support.tiny_models import batch, build, random_mask, state_bytes

TIED = "Model with `tie_word_embeddings=True`|Input and output embeddings are no longer tied"


def in_memory(base, adapters, weights=()):
    """What PEFT makes of the base with these adapters: name -> folder."""
    model = None
    for name, folder in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    for name, weight in zip(adapters, weights, strict=False):
        model.base_model.set_scale(name, weight)
    return model.merge_and_unload(adapter_names=list(adapters))


@pytest.fixture(params=[8 << 20, 100], ids=["one window", "many windows"])
def _window(request, monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW", request.param)
    monkeypatch.setattr(writing, "_PART", request.param)  # many parts of a file, too


@pytest.mark.usefixtures("_window")
@pytest.mark.filterwarnings(f"ignore:{TIED}")
@pytest.mark.parametrize("sharded", [False, True])
def test_the_result_is_that_of_memory_bit_for_bit(family, dtype, sharded, tmp_path):
    save_relatives(tmp_path, family, dtype=dtype, shards=sharded)
    save_adapter(tmp_path / "a", family, dtype=dtype)
    expected = in_memory(tmp_path / "base", {"a": tmp_path / "a"})
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == dtype
    assert state_bytes(merged) == state_bytes(expected)
    assert torch.equal(merged(batch()).logits, expected(batch()).logits)
    expected.save_pretrained(tmp_path / "memory")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


@pytest.mark.filterwarnings(f"ignore:{TIED}")
@pytest.mark.parametrize("family", ["gpt2", "gemma"])
@pytest.mark.parametrize("which", ["embedding", "head", "neither"])
def test_tied_embeddings_part_where_one_of_them_changes(family, which, tmp_path):
    save_relatives(tmp_path, family)
    mask = random_mask(build(family), 0.3)
    ends = {"embedding": ("embed_tokens", "wte"), "head": ("lm_head",), "neither": ("up_proj", "c_fc")}[which]
    save_adapter(tmp_path / "a", family, channels={name: mask[name] for name in mask if name.endswith(ends)})
    expected = in_memory(tmp_path / "base", {"a": tmp_path / "a"})
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings == (which == "neither")
    assert state_bytes(merged) == state_bytes(expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (which != "neither")
    sizes = [p.numel() * p.element_size() for p in merged.parameters()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in merged.parameters())


@pytest.mark.filterwarnings(f"ignore:{TIED}")
def test_a_tied_bias_gets_a_tensor_of_its_own(tmp_path):
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = BertLMHeadModel(BertConfig(vocab_size=48, is_decoder=True, **settings)).eval()
    base.save_pretrained(tmp_path / "base")
    head = "cls.predictions.decoder"
    assert f"{head}.bias" not in load_file(tmp_path / "base" / "model.safetensors")
    adapted = get_peft_model(base, ActConfig(channels={head: [1, 5]}, init_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "act")
    merge_checkpoint(tmp_path / "base", tmp_path / "act", tmp_path / "out")
    written, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert torch.equal(written["cls.predictions.bias"], before["cls.predictions.bias"])
    layer = adapted.base_model.model.get_submodule(head)
    expected = before["cls.predictions.bias"].clone()
    expected[[1, 5]] += layer.act_delta_bias["default"].detach()
    assert torch.equal(written[f"{head}.bias"], expected)
    merged = BertLMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(batch()).logits, adapted.eval()(batch()).logits)


@pytest.mark.filterwarnings(f"ignore:{TIED}")
def test_a_base_without_head_in_its_names_is_merged_too(tmp_path):
    save_relatives(tmp_path, "gpt2", shards=False)
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    save_adapter(tmp_path / "a", "gpt2")
    expected = in_memory(tmp_path / "base", {"a": tmp_path / "a"})
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert state_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == state_bytes(expected)


@pytest.mark.filterwarnings(f"ignore:{TIED}")
@pytest.mark.parametrize("as_names", [False, True])
def test_several_adapters_add_up_as_in_memory(family, dtype, tmp_path, as_names):
    save_relatives(tmp_path, family, dtype=dtype)
    adapters = {name: tmp_path / name for name in ("z", "x", "y")}
    for seed, folder in enumerate(adapters.values()):
        save_adapter(folder, family, dtype=dtype, seed=seed, density=0.5)
    weights = (0.3, -1.0, 0.7)
    expected = in_memory(tmp_path / "base", adapters, weights)
    if as_names:
        merge_checkpoint(
            tmp_path / "base", adapters, tmp_path / "out", weights=dict(zip(adapters, weights, strict=True))
        )
    else:
        merge_checkpoint(tmp_path / "base", list(adapters.values()), tmp_path / "out", weights=weights)
    assert state_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == state_bytes(expected)


def test_all_channels_of_a_square_weight_have_one_meaning(tmp_path):
    save_relatives(tmp_path, "llama")
    name = "model.layers.0.self_attn.q_proj"
    save_adapter(tmp_path / "all", channels={name: list(range(16))})
    save_adapter(tmp_path / "some", channels={name: [3, 5]})
    adapters = {"all": tmp_path / "all", "some": tmp_path / "some"}
    expected = in_memory(tmp_path / "base", adapters)
    merge_checkpoint(tmp_path / "base", adapters, tmp_path / "out")
    assert state_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == state_bytes(expected)


def test_only_selected_bytes_change_and_files_without_any_are_equal(tmp_path):
    save_relatives(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj"
    save_adapter(tmp_path / "a", channels={name: [2, 3, 20]})
    merge_checkpoint(tmp_path / "base", str(tmp_path / "a"), tmp_path / "out")
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    changed = index[f"{name}.weight"]
    for file in os.listdir(tmp_path / "base"):
        same = (tmp_path / "base" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        assert same == (file != changed), file
    before, after = load_file(tmp_path / "base" / changed), load_file(tmp_path / "out" / changed)
    for key in before:
        rows = (before[key] != after[key]).flatten(1).any(1) if before[key].dim() == 2 else before[key] != after[key]
        assert rows.nonzero().flatten().tolist() == ([2, 3, 20] if key == f"{name}.weight" else []), key


def test_what_belongs_to_the_model_comes_along_and_nothing_else(tmp_path):
    save_relatives(tmp_path, "llama")
    base = tmp_path / "base"
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
    ]
    unwanted = ["README.md", "optimizer.pt", "training_args.bin", "trainer_state.json", "pytorch_model.bin"]
    unwanted += ["pytorch_model.bin.index.json", "consolidated.safetensors", "notes.pkl"]
    for name in wanted + unwanted:
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    save_adapter(tmp_path / "a")
    merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert (set(wanted) | {"config.json", "generation_config.json"}) <= set(os.listdir(tmp_path / "out"))
    assert not set(unwanted) & set(os.listdir(tmp_path / "out"))
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"


@pytest.fixture
def folders(tmp_path):
    save_relatives(tmp_path, "llama")
    save_adapter(tmp_path / "a")
    return tmp_path


def refused(folders, match, error=ActValueError, adapters=None, base=None, output=None, **settings):
    output = folders / "out" if output is None else output
    before = sorted(os.listdir(output.parent)) if output.parent.is_dir() else None
    with pytest.raises(error, match=match):
        merge_checkpoint(base or folders / "base", folders / "a" if adapters is None else adapters, output, **settings)
    if before is not None:
        assert sorted(os.listdir(output.parent)) == before


def test_arguments_that_make_no_sense_are_refused(folders):
    a = folders / "a"
    refused(folders, "adapters: got none", adapters=[])
    refused(folders, "adapters: got 3, expected", ActTypeError, adapters=3)
    refused(folders, r"adapters: got \[3\], expected", ActTypeError, adapters=[3])
    refused(folders, "weights: got 2, expected one for each of the 1 adapters", weights=[1.0, 2.0])
    refused(folders, "weights: got nan, expected a finite number", weights=[float("nan")])
    refused(folders, "weights: got 'x', expected a finite number", ActTypeError, weights=["x"])
    refused(folders, "weights: got True, expected a finite number", ActTypeError, weights=[True])
    refused(folders, r"weights: got \['b'\], expected one for each of \['a'\]", adapters={"a": a}, weights={"b": 1.0})


def test_harmful_outputs_are_refused(folders):
    refused(folders, "is, lies in or holds the input", output=folders / "base")
    refused(folders, "is, lies in or holds the input", output=folders / "base" / "out")
    refused(folders, "is, lies in or holds the input", output=folders / "a", overwrite=True)
    refused(folders, "is, lies in or holds the input", output=folders)
    (folders / "out").mkdir()
    refused(folders, "out: exists, expected a new folder")
    merge_checkpoint(folders / "base", folders / "a", folders / "out", overwrite=True)
    merge_checkpoint(folders / "base", folders / "a", folders / "out", overwrite=True)
    assert sorted(os.listdir(folders)) == ["a", "base", "donor", "mask", "out"]


def test_a_full_disk_is_noticed_before_and_while_writing(folders, monkeypatch):
    usage = shutil.disk_usage(folders)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        refused(folders, "the disk has 0.00 GB free")

    def full(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.GatheringWriter, "write_with_rows", full)
    refused(folders, "cannot be written .*No space left on device")


def test_adapters_that_do_not_fit_are_refused(folders):
    for name, settings, match in (
        ("wider", {"intermediate_size": 32}, "down_proj: size mismatch: .* the base has weight"),
        ("another width", {"hidden_size": 32}, "size mismatch"),
    ):
        save_adapter_of(folders / name, build("llama", **settings))
        refused(folders, match, ActLoadError, adapters=folders / name)
    save_adapter_of(folders / "deeper", build("llama", num_hidden_layers=3))
    refused(folders, r"layers\.2\..* is missing in the checkpoint", adapters=folders / "deeper")
    save_adapter_of(folders / "taller", build("llama", intermediate_size=32), names=["up_proj"], last=True)
    refused(folders, r"up_proj: .* selects channel 31, the base has 24", ActLoadError, adapters=folders / "taller")
    save_adapter_of(folders / "biased", build("qwen2"), names=["q_proj"])
    refused(
        folders, "q_proj: .* has deltas for the bias, the base has none", ActLoadError, adapters=folders / "biased"
    )
    save_relatives(folders / "qwen2", "qwen2")
    save_adapter_of(folders / "plain", build("llama"), names=["q_proj"])
    refused(
        folders,
        "q_proj: .* has no deltas for the bias, the base has one",
        ActLoadError,
        adapters=folders / "plain",
        base=folders / "qwen2" / "base",
    )


def save_adapter_of(folder, model, names=None, last=False):
    from peft import get_peft_model

    from act_peft import ActConfig

    mask = random_mask(model, 0.3)
    channels = {n: mask[n] for n in mask if names is None or n.endswith(tuple(names))}
    if last:
        channels = {n: [0, mask.num_channels[n] - 1] for n in channels}
    get_peft_model(model, ActConfig(channels=channels, init_weights=False)).save_pretrained(folder)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_quantized_tensors_are_refused_where_they_would_change(tmp_path, part):
    save_relatives(tmp_path, "qwen2", shards=False)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    key = f"model.layers.0.self_attn.q_proj.{part}"
    save_file({**tensors, key: tensors[key].to(torch.int8)}, path)
    save_adapter(tmp_path / "a", "qwen2")
    match = rf"q_proj: {key} is I8, expected F64, F32, F16 or BF16"
    refused(tmp_path, match)
    save_adapter(tmp_path / "b", "qwen2", channels={"model.norm": [1]})
    merge_checkpoint(tmp_path / "base", tmp_path / "b", tmp_path / "out")
    if part == "bias":
        save_file({**tensors, key: tensors[key][:3]}, path)
        shutil.rmtree(tmp_path / "out")
        refused(tmp_path, r"has shape \[3\], fewer channels than the weight", ActLoadError)


def test_another_base_is_worth_a_warning(folders):
    with pytest.warns(ActWarning, match=r"a was made for a base with other weights than .*: \d+ of 21 modules"):
        merge_checkpoint(folders / "donor", folders / "a", folders / "out")
    assert (folders / "out").is_dir()
    shutil.rmtree(folders / "out")
    refused(folders, "was made for a base with other weights", ActWarning, base=folders / "donor")


@pytest.fixture(scope="module")
def run():
    with slow_runs() as function:
        yield function


def test_killed_at_any_moment_it_leaves_nothing_or_everything(folders, run):
    merge_checkpoint(folders / "base", folders / "a", folders / "expected")
    expected = contents(folders / "expected")
    output = folders / "place" / "out"
    output.parent.mkdir()
    arguments = [str(folders / "base"), str(folders / "a"), str(output)]
    moments = random.Random(0)
    outcomes = []

    def moment():
        while not outcomes and not os.listdir(output.parent):  # the first one dies in the middle for certain
            time.sleep(0.001)
        time.sleep(0 if not outcomes else moments.uniform(0.0, 0.4))

    for _ in range(12):
        run(f"act_peft.merge_checkpoint(*{arguments})", moment)
        outcomes.append(output.exists())
        if output.exists():
            assert contents(output) == expected
            shutil.rmtree(output)
    assert not outcomes[0]
    merge_checkpoint(*arguments)
    assert os.listdir(output.parent) == ["out"]
    assert contents(output) == expected


@pytest.mark.parametrize("job", ["merge_checkpoint", "create_adapter"])
def test_killed_at_any_moment_of_replacing_it_leaves_the_older_or_the_newer_result(folders, run, job):
    inputs = {"merge_checkpoint": ("base", "a"), "create_adapter": ("base", "donor", "mask")}[job]
    other = {"merge_checkpoint": {"weights": [2.0]}, "create_adapter": {"transfer_scale": 0.9}}[job]
    arguments = [str(folders / name) for name in inputs]
    make = getattr(act_peft, job)
    make(*arguments, folders / "older", **other)
    make(*arguments, folders / "newer")
    older, newer = contents(folders / "older"), contents(folders / "newer")
    assert older != newer
    output = folders / "place" / "out"
    statement = f"act_peft.{job}(*{arguments}, {str(output)!r}, overwrite=True)"

    def whole():
        while contents(output) != newer:
            time.sleep(0.001)

    shutil.copytree(folders / "older", output)
    longest = run(statement, whole)
    moments = random.Random(0)
    outcomes = []
    for n in range(10):
        shutil.rmtree(output)
        shutil.copytree(folders / "older", output)
        run(statement, lambda n=n: time.sleep((n + moments.random()) / 7 * longest))
        found = contents(output)
        assert found in (older, newer)
        outcomes.append(found == newer)
    assert not outcomes[0]
    make(*arguments, output, overwrite=True)
    assert os.listdir(output.parent) == ["out"]
    assert contents(output) == newer
