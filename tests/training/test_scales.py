"""Learned transfer scales: the formula and its gradients, the proximal step, pruning, saving and resuming."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from act_peft import (
    ActConfig,
    ActLoadError,
    ActTypeError,
    ActValueError,
    ScaleSparsityCallback,
    export_lora,
    initialize_from_donor,
    merge_checkpoint,
    prune_channels,
)
from act_peft.channels.kinds import channel_kind
from act_peft.layers import ActLayer
from act_peft.training.scales import soft_threshold_
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import batch, build, build_relatives, random_mask, state_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word|Input and output embeddings are no longer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]


def learning(family="llama", *, dtype=torch.float32, density=0.3, trainable="scales", transfer_scale=0.4, base=None):
    """A model with learned scales on the difference of two relatives; base and donor."""
    mine, donor = build_relatives(family, dtype=dtype)
    base = mine if base is None else base
    config = ActConfig(
        channels=random_mask(base, density), trainable=trainable, transfer_scale=transfer_scale, task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.deepcopy(base), config)
    initialize_from_donor(model, donor)
    return model.eval(), base, donor


def layers_of(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, ActLayer)}


def randomize(model, *, seed=0, zeros=0.5):
    """Random scales in [0, 1], a share of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model).values():
            scales = layer.act_delta_channel_scale["default"]
            drawn = torch.rand(scales.shape, generator=generator)
            scales.copy_(drawn * (torch.rand(scales.shape, generator=generator) >= zeros))


def scales_of(model):
    return {n: layer.act_delta_channel_scale["default"].detach().clone() for n, layer in layers_of(model).items()}


# ---------------------------------------------------------------------------------------------------- the formula ---


def test_a_channel_goes_its_scale_s_part_of_the_way_to_the_donor(family, dtype):
    model, base, donor = learning(family, dtype=dtype)
    randomize(model)
    scales = scales_of(model)
    merged = model.merge_and_unload()
    for name, index in random_mask(base, 0.3).items():
        mine, theirs, got = (m.get_submodule(name) for m in (base, donor, merged))
        dim = channel_kind(mine).channel_dim
        for part, axis in (("weight", dim), ("bias", 0)):
            if getattr(mine, part, None) is None:
                continue
            rows, other = (getattr(m, part).detach().index_select(axis, index) for m in (mine, theirs))
            difference = (other.float() - rows.float()).to(dtype).double()  # kept in the base's dtype
            shape = [1] * rows.dim()
            shape[axis] = -1
            expected = (rows.double() + scales[name].double().view(shape) * difference).to(dtype)
            result = getattr(got, part).detach().index_select(axis, index)
            torch.testing.assert_close(result, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_unmerged_model_answers_as_the_merged_one(family):
    model, _, _ = learning(family)
    randomize(model)
    expected = copy.deepcopy(model).merge_and_unload()(batch()).logits
    torch.testing.assert_close(model(batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_scales_of_one_are_the_donor_and_of_zero_the_base(family):
    model, base, donor = learning(family, density=1.0, transfer_scale=1.0)
    torch.testing.assert_close(model(batch()).logits, donor(batch()).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.act_delta_channel_scale["default"].zero_()
    assert torch.equal(model(batch()).logits, base(batch()).logits)


@pytest.mark.parametrize("trainable", ["scales", "both"])
def test_only_what_should_train_trains(trainable):
    model, _, _ = learning(trainable=trainable, dtype=torch.bfloat16)
    names = {n.rpartition(".act_delta_")[2] for n, p in model.named_parameters() if p.requires_grad}
    scales = {"channel_scale.default"}
    assert names == (scales if trainable == "scales" else scales | {"weight.default"})
    for layer in layers_of(model).values():
        assert layer.act_delta_channel_scale["default"].dtype == torch.float32
        dtype = torch.bfloat16 if trainable == "scales" else torch.float32
        assert layer.act_delta_weight["default"].dtype == dtype
    model.base_model.set_adapter("default")
    model.base_model.set_requires_grad("default")
    assert {n.rpartition(".act_delta_")[2] for n, p in model.named_parameters() if p.requires_grad} == names
    model.add_adapter("rows", ActConfig(channels={"up_proj": [1]}))
    model.set_adapter("rows")
    assert all("rows" in n for n, p in model.named_parameters() if p.requires_grad)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "no bias": (lambda: nn.Linear(5, 7, bias=False), (3, 5)),
    "Conv1D": (lambda: Conv1D(7, 5), (3, 5)),
    "embedding": (lambda: nn.Embedding(6, 7), None),
    "layer norm": (lambda: nn.LayerNorm(7), (3, 7)),
    "RMS norm": (lambda: nn.RMSNorm(7), (3, 7)),
}


@pytest.mark.parametrize("trainable", ["scales", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_finite_differences(kind, trainable):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    base, donor = nn.Sequential(make()).double(), nn.Sequential(make()).double()
    with torch.no_grad():
        for mine, theirs in zip(base.parameters(), donor.parameters(), strict=True):
            theirs.copy_(mine + (0.1 * torch.randn_like(mine)) * mine.abs().mean())
    model = get_peft_model(base, ActConfig(channels={"0": [0, 2, 3, 6]}, trainable=trainable))
    initialize_from_donor(model, donor)
    model.double()  # the scales too, so that differences say something
    x = torch.tensor([0, 3, 3, 5]) if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = parameters if shape is None else [x, *parameters]
    assert len(parameters) == 1 if trainable == "scales" else len(parameters) > 1
    assert torch.autograd.gradcheck(lambda *_: model(x), inputs)


# --------------------------------------------------------------------------------------------- the proximal step ---


def test_the_soft_threshold_is_the_closed_form():
    scales = torch.tensor([-2.0, -0.3, -0.1, 0.0, 0.05, 0.2, 0.7, 1.5])
    expected = [
        max(min((abs(s) - 0.2) * (1 if s > 0 else -1) if abs(s) > 0.2 else 0.0, 1.0), -0.5) for s in scales.tolist()
    ]
    soft_threshold_(scales, 0.2, bounds=(-0.5, 1.0))
    torch.testing.assert_close(scales, torch.tensor(expected))
    assert bool((scales[2:6] == 0).all())


def train(model, tmp_path, *callbacks, examples=16, **changes):
    trainer = SFTTrainer(
        model,
        args=training_settings(
            tmp_path, max_steps=4, learning_rate=0.05, logging_strategy="steps", logging_steps=1, **changes
        ),
        train_dataset=prompt_completion(examples),
        processing_class=build_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


class Watch(ScaleSparsityCallback):
    """Notes the learning rates and the scales before and after each proximal step."""

    seen: list

    def on_optimizer_step(self, args, state, control, **kwargs):
        before = scales_of(kwargs["model"])
        super().on_optimizer_step(args, state, control, **kwargs)
        self.seen.append((kwargs["optimizer"].param_groups[0]["lr"], before, scales_of(kwargs["model"])))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_each_step_the_trainer_s_own_learning_rate_shrinks_the_scales(tmp_path, accumulate):
    model, base, _ = learning()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    watch = Watch(l1=1.0, bounds=(0, 0.38))
    watch.seen = []
    trainer = train(model, tmp_path, watch, gradient_accumulation_steps=accumulate)
    assert len(watch.seen) == 4
    rates = [rate for rate, _, _ in watch.seen]
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])  # linear decay
    for rate, before, after in watch.seen:
        for name, scales in before.items():
            expected = torch.sign(scales) * (scales.abs() - rate).clamp(min=0)
            torch.testing.assert_close(after[name], expected.clamp(0, 0.38))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert state_bytes(model.get_base_model()) == state_bytes(base)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    final = torch.cat(list(watch.seen[-1][2].values()))
    assert logs[-1]["scale_density"] == pytest.approx(float((final != 0).float().mean()))
    assert logs[-1]["scale_mean"] == pytest.approx(float(final.mean()), rel=1e-5)
    assert {"scale_density/linear", "scale_density/embedding", "scale_density/RMS_norm"} <= logs[-1].keys()


def test_without_scales_the_callback_says_so(tmp_path):
    base = build("llama")
    model = get_peft_model(base, ActConfig(channels={"up_proj": [1]}, task_type="CAUSAL_LM"))
    with pytest.raises(ActValueError, match="ScaleSparsityCallback: no learned scale is trained"):
        train(model, tmp_path, ScaleSparsityCallback(0.1))


def test_without_a_difference_the_callback_says_so(tmp_path):
    base = build("llama")
    config = {"channels": {"up_proj": [1]}, "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(base), ActConfig(trainable="scales", **config))
    with pytest.raises(ActValueError, match="ScaleSparsityCallback: all frozen differences are zero"):
        train(model, tmp_path, ScaleSparsityCallback(0.1))
    # Rows that train need not start anywhere.
    train(get_peft_model(base, ActConfig(trainable="both", **config)), tmp_path, ScaleSparsityCallback(0.1))


def test_an_optimizer_of_copies_is_refused():
    model, _, _ = learning()
    flat = nn.Parameter(torch.cat(list(scales_of(model).values())))
    with pytest.raises(ActValueError, match="ScaleSparsityCallback: the optimizer has none of the learned scales"):
        ScaleSparsityCallback(1.0).on_optimizer_step(
            None, None, None, model=model, optimizer=torch.optim.SGD([flat], lr=0.1)
        )


def test_a_step_that_was_skipped_shrinks_nothing():
    model, _, _ = learning()
    before = scales_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for skipped in (True, False):
        optimizer.step_was_skipped = skipped  # as accelerate's optimizer says it
        ScaleSparsityCallback(1.0).on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
        assert all(torch.equal(scales, before[name]) for name, scales in scales_of(model).items()) is skipped


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"l1": True}, ActTypeError, "l1: got True"),
        ({"l1": 0, "bounds": ("a", "b")}, ActTypeError, r"bounds: got 'a', expected two ascending numbers"),
        ({"l1": 0, "bounds": (0, None)}, ActTypeError, r"bounds: got None"),
        ({"l1": -1}, ActValueError, "l1: got -1, expected a finite number of at least 0"),
        ({"l1": float("nan")}, ActValueError, "l1: got nan"),
        ({"l1": "x"}, ActTypeError, "l1: got 'x'"),
        ({"l1": 0, "bounds": (1, 0)}, ActValueError, r"bounds: got \(1, 0\), expected two ascending"),
        ({"l1": 0, "bounds": (0, 1, 2)}, ActValueError, r"bounds: got \(0, 1, 2\), expected two ascending"),
        ({"l1": 0, "bounds": (0, float("nan"))}, ActValueError, r"bounds: got \(0, nan\), expected two ascending"),
        ({"l1": 0, "bounds": 1}, ActTypeError, "bounds: got 1, expected two ascending"),
    ],
)
def test_settings_of_the_callback_are_checked(arguments, error, match):
    with pytest.raises(error, match=match):
        ScaleSparsityCallback(**arguments)


# ------------------------------------------------------------------------------------------------------- pruning ---


@pytest.mark.parametrize("trainable", ["scales", "both"])
def test_pruning_folds_the_scales_in_and_drops_zeros(family, trainable):
    model, base, _ = learning(family, trainable=trainable)
    randomize(model)
    scales, before = scales_of(model), model(batch()).logits
    rows = {n: layer.act_delta_weight["default"].detach().clone() for n, layer in layers_of(model).items()}
    dropped = next(iter(scales))
    with torch.no_grad():
        layers_of(model)[dropped].act_delta_channel_scale["default"].zero_()
    scales[dropped].zero_()
    before = model(batch()).logits
    prune_channels(model)
    left = layers_of(model)
    assert dropped not in left
    for name, layer in left.items():
        kept = scales[name] != 0
        assert torch.equal(layer.act_delta_index["default"], random_mask(base, 0.3)[name][kept])
        dim = layer.kind.channel_dim
        shape = [1] * rows[name].dim()
        shape[dim] = -1
        expected = (rows[name] * scales[name].view(shape)).index_select(dim, kept.nonzero().squeeze(1))
        assert torch.equal(layer.act_delta_weight["default"], expected)
        assert layer.act_delta_weight["default"].requires_grad
        assert not layer.act_delta_channel_scale
    torch.testing.assert_close(model(batch()).logits, before, rtol=1e-4, atol=1e-4)
    config = model.peft_config["default"]
    assert config.trainable == "deltas"
    assert config.adapted_modules.keys() == left.keys()
    total = sum(random_mask(base, 0.3).num_channels.values())
    assert config.density == pytest.approx(
        sum(layer.act_delta_index["default"].numel() for layer in left.values()) / total
    )


def test_dropped_zeros_change_no_bit():
    """Scales of 0 and 1 only, so that folding the others in rounds nothing."""
    model, _, _ = learning()
    with torch.no_grad():
        for layer in layers_of(model).values():
            scales = layer.act_delta_channel_scale["default"]
            scales.copy_((torch.arange(scales.numel()) % 2).float())
    changed = {n: layer for n, layer in layers_of(model).items() if layer.act_delta_index["default"].numel() > 1}
    x = {n: torch.randint(0, 40, (3,)) if "embed" in n else torch.randn(3, m.in_features) for n, m in changed.items()}
    before = {n: layer(x[n]) for n, layer in changed.items()}
    base = {n: layer.base_layer(x[n]) for n, layer in changed.items()}
    zeros = {
        n: layer.act_delta_index["default"][layer.act_delta_channel_scale["default"] == 0]
        for n, layer in changed.items()
    }
    prune_channels(model)
    for name, layer in changed.items():
        after = layer(x[name])
        assert torch.equal(after[..., zeros[name]], base[name][..., zeros[name]])
        assert torch.equal(after[..., zeros[name]], before[name][..., zeros[name]])
        torch.testing.assert_close(after, before[name])


def test_a_threshold_drops_small_scales():
    model, base, _ = learning()
    randomize(model)
    scales = scales_of(model)
    prune_channels(model, threshold=0.5)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.act_delta_index["default"], random_mask(base, 0.3)[name][scales[name] > 0.5])


def test_bad_pruning_is_refused_and_changes_nothing():
    model, _, _ = learning()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def refused(match, error=ActValueError, **arguments):
        with pytest.raises(error, match=match):
            prune_channels(model, **arguments)
        after = model.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items() if n in after)

    refused("threshold: got -1, expected a finite number of at least 0", threshold=-1)
    refused("threshold: got 'x', expected a finite number of", ActTypeError, threshold="x")
    refused("threshold: got 5, which no learned scale exceeds", threshold=5)
    refused("has no ACT adapter 'other'", adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ActValueError, match="adapter 'default' is merged, expected an unmerged one"):
        prune_channels(model)
    model.unmerge_adapter()
    prune_channels(model)
    with pytest.raises(ActValueError, match="adapter 'default' has no learned scales, expected trainable='scales'"):
        prune_channels(model)


def test_scales_that_are_not_finite_are_not_pruned_away():
    model, _, _ = learning()
    with torch.no_grad():
        model.get_base_model().lm_head.act_delta_channel_scale["default"][0] = float("nan")
    with pytest.raises(ActValueError, match="lm_head: got learned scales that are not finite, expected"):
        prune_channels(model)


def test_a_reference_that_shares_the_configuration_keeps_its_scales(tmp_path):
    model, base, _ = learning()
    model.add_adapter("ref", model.peft_config["default"])  # as TRL's trainers do
    prune_channels(model)
    assert model.peft_config["ref"].trainable == "scales"
    assert model.peft_config["default"].trainable == model.base_model.peft_config["default"].trainable == "deltas"
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "ref"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        torch.testing.assert_close(loaded(batch()).logits, model(batch()).logits, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_is_pruned_as_the_model_inside(tmp_path):
    model, base, _ = learning()
    randomize(model)
    prune_channels(torch.compile(model, backend="eager"))
    assert set(model.peft_config["default"].adapted_modules) == set(layers_of(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(batch()).logits, model(batch()).logits)


def test_a_parallel_wrapper_is_refused():
    model, _, _ = learning()
    with pytest.raises(ActTypeError, match="got a DataParallel, expected the model inside"):
        prune_channels(nn.DataParallel(model))


# -------------------------------------------------------------------------------------------------------- files ---


@pytest.mark.parametrize("trainable", ["scales", "both"])
def test_scales_are_saved_and_loaded_bit_by_bit(family, dtype, trainable, tmp_path):
    model, base, _ = learning(family, dtype=dtype, trainable=trainable)
    randomize(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable"] == trainable
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[n], t) and state[n].dtype == t.dtype for n, t in expected.items())
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trains


def test_a_pruned_adapter_is_an_ordinary_small_one(tmp_path):
    model, base, _ = learning()
    randomize(model, zeros=0.8)
    model.save_pretrained(tmp_path / "scales")
    prune_channels(model)
    model.save_pretrained(tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned" / "adapter_model.safetensors")
    assert not any("channel_scale" in name for name in tensors)
    size = {n: (tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("scales", "pruned")}
    assert size["pruned"] < 0.6 * size["scales"]
    loaded = PeftModel.from_pretrained(base, tmp_path / "pruned").eval()
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)


def test_training_resumes_where_it_was(tmp_path):
    """Four steps at once, and two, a restart from the checkpoint, and two more."""

    def run(folder, steps, **how):
        model, _, _ = learning()
        trainer = SFTTrainer(
            model,
            args=training_settings(
                folder, max_steps=4, learning_rate=0.05, save_strategy="steps", save_steps=2, **how
            ),
            train_dataset=prompt_completion(16),
            processing_class=build_tokenizer(),
            callbacks=[ScaleSparsityCallback(0.5)],
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if steps == 2 else None)
        return scales_of(model)

    whole = run(tmp_path, 4)
    resumed = run(tmp_path, 2)
    assert all(torch.equal(resumed[name], scales) for name, scales in whole.items())


def test_the_channels_of_a_square_weight_lie_where_its_kind_says(tmp_path):
    model, base, _ = learning("gpt2", density=1.0)
    randomize(model)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "scales")
    merge_checkpoint(tmp_path / "base", tmp_path / "scales", tmp_path / "out")
    got, expected = load_file(tmp_path / "out" / "model.safetensors"), model.merge_and_unload().state_dict()
    assert got["transformer.h.0.attn.c_proj.weight"].shape == (16, 16)  # a Conv1D
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    config = json.loads((tmp_path / "scales" / "adapter_config.json").read_text())
    config["adapted_modules"]["transformer.h.0.attn.c_proj"]["kind"] = "?"
    (tmp_path / "scales" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ActLoadError, match=r"attn.c_proj: all channels of a square weight have learned scales"):
        merge_checkpoint(tmp_path / "base", tmp_path / "scales", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("how", ["merge", "export"])
def test_saved_scales_count_wherever_files_are_read(tmp_path, how):
    model, base, _ = learning()
    randomize(model)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "scales")
    if how == "merge":
        merge_checkpoint(tmp_path / "base", tmp_path / "scales", tmp_path / "out")
        got = load_file(tmp_path / "out" / "model.safetensors")
        expected = model.merge_and_unload().state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        return
    export_lora(tmp_path / "scales", tmp_path / "out", biases="modules_to_save", base=tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(loaded(batch()).logits, model(batch()).logits, rtol=1e-4, atol=1e-4)


def test_scales_that_do_not_fit_are_refused(tmp_path):
    from tests.support.tiny_checkpoints import change_adapter

    model, base, _ = learning()
    key = "base_model.model.lm_head.act_delta_channel_scale"
    for change, match in (
        (lambda t: t[:-1], "size mismatch for act_delta_channel_scale"),
        (lambda t: t.int(), "act_delta_channel_scale is torch.int32"),
        (lambda t: None, "has no act_delta_channel_scale"),
    ):
        model.save_pretrained(tmp_path / "adapter")
        change_adapter(tmp_path / "adapter", key, change)
        with pytest.raises(ActLoadError, match=match):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        base.save_pretrained(tmp_path / "base")
        with pytest.raises(ActLoadError, match=match):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_configuration_with_a_donor_starts_the_scales_at_the_transfer_scale(tmp_path):
    base, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path)
    mask = random_mask(base, 0.3)
    config = ActConfig(channels=mask, donor=str(tmp_path), transfer_scale=0.25, trainable="scales")
    model = get_peft_model(copy.deepcopy(base), config)
    for name, layer in layers_of(model).items():
        assert bool((layer.act_delta_channel_scale["default"] == 0.25).all())
        dim = layer.kind.channel_dim
        expected = (donor.get_submodule(name).weight - base.get_submodule(name).weight).index_select(dim, mask[name])
        assert torch.equal(layer.act_delta_weight["default"], expected)


def test_optimizers_hold_one_number_a_channel(tmp_path):
    model, base, _ = learning(density=0.2)
    trainer = train(model, tmp_path)
    count = sum(index.numel() for index in random_mask(base, 0.2).values())
    states = [s["exp_avg"].numel() for s in trainer.optimizer.state.values()]
    assert sum(states) == count
    assert isinstance(trainer.args, TrainingArguments)
    assert isinstance(model, nn.Module)
