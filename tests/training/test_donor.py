"""The donor as teacher of its ability: in every method of training, from memory or an adapter, kept or released."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import SFTTrainer

from act_peft import ActConfig, ActTypeError, ActValueError, ActWarning, DonorCallback, KeepCallback
from tests.support.teaching import Gradients, Passes, adapted, keep_batch, train
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import build, build_relatives, random_mask, state_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]
LORA = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def distance(donor, model, inputs, *, tokens=None):
    """KL(donor || model) over the answers' tokens, from its definition, in float64."""
    with torch.no_grad():
        target = donor(input_ids=inputs["input_ids"]).logits.double()[..., :tokens].softmax(-1)
    mine = model(input_ids=inputs["input_ids"]).logits.double()[..., :tokens].softmax(-1)
    terms = (target * (target.log() - mine.log())).sum(-1)[:, :-1]
    return terms[inputs["labels"][:, 1:] != -100].mean()


def student(method):
    base, _ = build_relatives("llama")
    if method == "ACT":
        return get_peft_model(base, ActConfig(channels=random_mask(base, 0.3), task_type="CAUSAL_LM"))
    return get_peft_model(base, LoraConfig(**LORA)) if method == "LoRA" else base.requires_grad_(True)


def adapter_folder(path, kind="LoRA"):
    """An adapter of the base of `student`, and the model with it."""
    base, _ = build_relatives("llama")
    if kind == "LoRA":
        config = LoraConfig(**LORA, init_lora_weights=False)
    else:
        channels = {"up_proj": [1, 2], "lm_head": [3]}
        config = ActConfig(channels=channels, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.save_pretrained(path)
    return str(path), model.eval()


def logged(trainer, figure="donor_divergence"):
    return [entry[figure] for entry in trainer.state.log_history if "loss" in entry]


# ---------------------------------------------------------------------------------------------------- the gradient ---


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["ACT", "LoRA", "full"])
def test_its_gradient_joins_that_of_the_trainer_s_loss_once_a_step(tmp_path, method, accumulate):
    settings = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    model, inputs, donor = student(method).eval(), keep_batch(), build_relatives("llama")[1]
    distance(donor, model, inputs).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone, together, before = Gradients(), Gradients(), state_bytes(donor)
    train(copy.deepcopy(model), tmp_path / "alone", alone, **settings)
    donor.train()
    train(model, tmp_path / "together", DonorCallback(donor, [inputs], weight=3.0), together, **settings)
    assert together.seen[0].keys() == expected.keys()
    for name, gradient in together.seen[0].items():
        torch.testing.assert_close(gradient, alone.seen[0][name] + 3 * expected[name], rtol=1e-3, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    assert donor.training
    assert state_bytes(donor) == before
    assert all(parameter.grad is None for parameter in donor.parameters())


@pytest.mark.parametrize("method", ["ACT", "LoRA", "full"])
def test_the_ability_comes_over(tmp_path, method):
    donor, inputs, ends = build_relatives("llama")[1], keep_batch(), []
    for callbacks in ([], [DonorCallback(donor, [inputs], weight=30.0)]):
        torch.manual_seed(0)
        model = student(method)
        train(model, tmp_path / f"{len(callbacks)}", *callbacks, steps=12, optim="adamw_torch", learning_rate=1e-2)
        ends.append(float(distance(donor, model.eval(), inputs).detach()))
    assert ends[1] < 0.5 * ends[0]


def test_the_donor_runs_once_for_each_sample(tmp_path):
    donor = build_relatives("llama")[1]
    passes = Passes(donor.model)
    batches = [keep_batch(5), keep_batch(6)]
    train(student("ACT"), tmp_path / "1", passes, DonorCallback(donor, batches), steps=5)
    assert [sum(step) > 0 for step in passes.steps] == [True, True, False, False, False]
    train(student("ACT"), tmp_path / "2", passes, DonorCallback(donor, batches, max_cached_tokens=0), steps=5)
    assert passes.steps[2:] == [[4]] * 3


def test_both_teachers_at_once(tmp_path):
    model, donor = adapted(), build_relatives("llama")[1]
    inputs, other = keep_batch(5), keep_batch(6)
    model.eval()
    base = build_relatives("llama")[0]
    kept, brought = (float(distance(t, model, i).detach()) for t, i in ((base, inputs), (donor, other)))
    callbacks = [KeepCallback([inputs]), DonorCallback(donor, [other])]
    trainer = train(model, tmp_path, *callbacks, steps=3, learning_rate=0.0)
    assert logged(trainer, "keep_divergence") == pytest.approx([kept] * 3, rel=1e-3)
    assert logged(trainer) == pytest.approx([brought] * 3, rel=1e-3)


# ----------------------------------------------------------------------------------------------- adapters as donor ---


@pytest.mark.parametrize("kind", ["LoRA", "ACT"])
@pytest.mark.parametrize("method", ["ACT", "LoRA"])
def test_an_adapter_of_the_base_is_a_donor_in_the_memory_of_one_model(tmp_path, method, kind):
    folder, donor = adapter_folder(tmp_path / "donor", kind)
    model, inputs = student(method), keep_batch()
    expected = float(distance(donor, model.eval(), inputs).detach())
    base = {name: p.data_ptr() for name, p in model.get_base_model().named_parameters() if not p.requires_grad}
    callback = DonorCallback(folder, [inputs])
    trainer = train(model, tmp_path / "1", callback, KeepCallback([inputs]), steps=3, learning_rate=0.0)
    assert expected > 1e-3
    assert logged(trainer) == pytest.approx([expected] * 3, rel=1e-3)
    assert logged(trainer, "keep_divergence") == pytest.approx([0.0] * 3, abs=1e-6)
    teacher = callback._teacher._asked[0].model
    shared = {p.data_ptr() for p in teacher.parameters()}
    assert shared >= {pointer for name, pointer in base.items() if "lora" not in name and "act_delta" not in name}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains
    assert all("lora" in name or "act_delta" in name for name in trains)


def test_an_adapter_does_not_teach_the_base_that_it_stands_on(tmp_path):
    folder, _ = adapter_folder(tmp_path / "donor")
    with pytest.raises(ActValueError, match="got a donor that has weights in common with what is trained"):
        train(student("full"), tmp_path / "1", DonorCallback(folder, [keep_batch()]))


def test_an_adapter_beside_a_merged_one_is_refused(tmp_path):
    folder, _ = adapter_folder(tmp_path / "donor")
    model = student("LoRA")
    model.merge_adapter()
    with pytest.raises(ActValueError, match="the model has merged adapters, expected none"):
        train(model, tmp_path / "1", DonorCallback(folder, [keep_batch()]))


def test_what_is_no_adapter_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "whole")
    with pytest.raises(ActValueError, match=r"donor: .*whole has no adapter_config.json"):
        train(student("ACT"), tmp_path / "1", DonorCallback(tmp_path / "whole", [keep_batch()]))


def test_the_model_does_not_teach_itself(tmp_path):
    model = adapted()
    with pytest.raises(ActValueError, match="got a donor that has weights in common with what is trained"):
        train(model, tmp_path, DonorCallback(model, [keep_batch()]))


# ------------------------------------------------------------------------------------------------- released donors ---


def test_a_released_donor_is_gone_before_the_first_step(tmp_path):
    donor = build_relatives("llama")[1]
    inputs, model = [keep_batch(5), keep_batch(6)], student("ACT").eval()
    expected = [float(distance(donor, model, part).detach()) for part in inputs]
    backbone = weakref.ref(donor.model)
    callback = DonorCallback(donor, inputs, release_donor=True)
    del donor
    trainer = train(model, tmp_path / "1", callback, steps=4, learning_rate=0.0)
    gc.collect()
    assert backbone() is None
    assert logged(trainer) == pytest.approx(expected * 2, rel=1e-3)
    again = train(student("LoRA"), tmp_path / "2", callback, steps=2, learning_rate=0.0)  # its answers are still here
    assert logged(again) == pytest.approx(expected, rel=1e-3)


def test_a_released_donor_answers_what_it_was_asked(tmp_path):
    class Changing:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter([keep_batch(self.rounds)])

    callback = DonorCallback(build_relatives("llama")[1], Changing(), release_donor=True)
    with pytest.raises(ActValueError, match="got a sample that the donor did not answer before it was released"):
        train(student("ACT"), tmp_path, callback)


@pytest.mark.parametrize("tokens", [0, 13])
def test_answers_that_do_not_fit_are_refused(tmp_path, tokens):
    callback = DonorCallback(
        build_relatives("llama")[1], [keep_batch(5), keep_batch(6)], max_cached_tokens=tokens, release_donor=True
    )
    number = 0 if tokens == 0 else 1
    with pytest.raises(ActValueError, match=f"release_donor: the answers of batch {number} cannot be kept, expected"):
        train(student("ACT"), tmp_path, callback)


# ------------------------------------------------------------------------------------------------------ vocabulary ---


@pytest.mark.parametrize("tokens", [44, 56])
def test_common_tokens_are_compared(tmp_path, tokens):
    donor = build("llama", seed=3, vocab_size=tokens)
    inputs = {name: tensor.clone() for name, tensor in keep_batch().items()}
    inputs["input_ids"].clamp_(max=43)
    inputs["labels"].clamp_(max=43)
    model = student("ACT").eval()
    expected = float(distance(donor, model, inputs, tokens=min(tokens, 48)).detach())
    with pytest.warns(ActWarning, match=f"the base has 48 tokens, the donor {tokens}: .* of them are left out"):
        trainer = train(model, tmp_path, DonorCallback(donor, [inputs]), steps=2, learning_rate=0.0)
    assert logged(trainer) == pytest.approx([expected] * 2, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*of them are left out")
def test_tokens_that_the_donor_does_not_know_are_refused(tmp_path):
    donor = build("llama", vocab_size=20)
    with pytest.raises(ActValueError, match=r"ability_dataloader: batch 0: input_ids: got token .*, expected"):
        train(student("ACT"), tmp_path, DonorCallback(donor, [keep_batch()]))


# -------------------------------------------------------------------------------------------------------- refusals ---


@pytest.mark.parametrize("donor", [None, 3, {"model": 1}])
def test_what_is_no_donor_is_refused(donor):
    with pytest.raises(ActTypeError, match=f"donor: got {type(donor).__name__}, expected a torch.nn.Module"):
        DonorCallback(donor, [keep_batch()])


def test_its_arguments_are_checked_as_those_of_the_other_teacher():
    donor = build("llama")
    with pytest.raises(ActValueError, match="weight: got 0, expected a finite number above 0"):
        DonorCallback(donor, [keep_batch()], 0)
    with pytest.raises(ActTypeError, match="ability_dataloader: got dict, expected an iterable of batches"):
        DonorCallback(donor, keep_batch())
    with pytest.raises(ActTypeError, match="ability_dataloader: got generator, expected batches that can be read rep"):
        DonorCallback(donor, (b for b in [keep_batch()]))


def test_answers_that_are_not_finite_are_refused(tmp_path):
    donor = build("llama")
    with torch.no_grad():
        donor.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ActValueError, match="the divergence from the donor's answers is nan, expected a finite"):
        train(student("ACT"), tmp_path, DonorCallback(donor, [keep_batch()]))


@pytest.mark.parametrize("release", [False, True])
def test_a_resumed_training_goes_on_with_the_batches_that_follow(tmp_path, release):
    batches = [keep_batch(seed) for seed in range(3)]

    def run(resume=None):
        model, donor = student("ACT"), build_relatives("llama")[1]
        trainer = SFTTrainer(
            model,
            args=training_settings(tmp_path, max_steps=4, save_strategy="steps", save_steps=1),
            train_dataset=prompt_completion(16),
            processing_class=build_tokenizer(),
            callbacks=[DonorCallback(donor, batches, weight=20.0, release_donor=release)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    whole, resumed = run(), run(str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)


def test_samples_come_back_in_other_batches_of_a_shuffling_dataloader(tmp_path):
    tokenising = SFTTrainer(
        build("llama"),
        args=training_settings(tmp_path, per_device_train_batch_size=3),
        train_dataset=prompt_completion(6),
        processing_class=build_tokenizer(),
    )
    donor = build_relatives("llama")[1]
    passes = Passes(donor.model)
    callback = DonorCallback(donor, tokenising.get_train_dataloader())
    trainer = train(student("ACT"), tmp_path, passes, callback, steps=6)
    assert [sum(step) > 0 for step in passes.steps] == [True, True, False, False, False, False]
    assert all(value > 0 for value in logged(trainer))
