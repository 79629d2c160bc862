"""The base as teacher of what is to be kept: its gradient, its place in a Trainer's step, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTTrainer

from act_peft import ActConfig, ActTypeError, ActValueError, KeepCallback, ScaleSparsityCallback, fit
from tests.support.teaching import Gradients, Passes, adapted, divergence, keep_batch, train
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import build, build_relatives, random_mask, state_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries below TRL
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # no accelerator
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # the older name
]


# -------------------------------------------------------------------------------------------------- the gradient ---


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_its_gradient_joins_that_of_the_trainer_s_loss_once_a_step(tmp_path, accumulate, family):
    settings = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    model, inputs = adapted(family=family), keep_batch()
    model.eval()  # the oracle's mode; nothing here drops out
    divergence(model, inputs).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone, together = Gradients(), Gradients()
    train(copy.deepcopy(model), tmp_path / "alone", alone, **settings)
    train(model, tmp_path / "together", KeepCallback([inputs], weight=3.0), together, **settings)
    assert len(together.seen) == 1
    assert together.seen[0].keys() == expected.keys()
    for name, gradient in together.seen[0].items():
        torch.testing.assert_close(gradient, alone.seen[0][name] + 3 * expected[name], rtol=1e-3, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3


CASES = {
    "ACT": ("llama", None),
    "ACT, biases": ("qwen2", None),
    "ACT, tied": ("gpt2", None),
    "ACT, tied, soft-capped": ("gemma", None),
    "LoRA": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "LoRA on the output layer": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "a saved output layer": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


class FromTheDefinition(TrainerCallback):
    """Notes the divergence at the start of each step."""

    def __init__(self, batches):
        self.batches, self.seen = batches, []

    def on_step_begin(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.seen.append(float(divergence(kwargs["model"].eval(), self.batches[len(self.seen) % 2])))


@pytest.mark.filterwarnings("ignore:.*`(forward|loss)`.*output layer.*:UserWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_divergence_from_its_definition_in_every_round(tmp_path, case, accumulate):
    family, lora = CASES[case]
    settings = {
        "gemma": {"final_logit_softcapping": 3.0},
        "gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},  # the definition has no dropout
    }.get(family, {})
    ends = []
    for cached in (0, 100):
        torch.manual_seed(0)
        config = None if lora is None else LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **lora)
        model, batches = adapted(config, family=family, base_settings=settings), [keep_batch(5), keep_batch(6)]
        exact = FromTheDefinition(batches)
        passes = Passes(model.get_base_model().base_model)
        keep = KeepCallback(batches, weight=5.0, max_cached_tokens=cached)
        changes = {"gradient_accumulation_steps": accumulate, "optim": "adamw_torch", "learning_rate": 3e-3}
        changes["per_device_train_batch_size"] = 4 // accumulate
        changes["with_trl"] = lora is None or "lm_head" not in lora["target_modules"]  # TRL refuses those
        trainer = train(model, tmp_path / f"{cached}", passes, exact, keep, steps=5, **changes)
        found = [entry["keep_divergence"] for entry in trainer.state.log_history if "loss" in entry]
        assert found == pytest.approx(exact.seen, rel=1e-3, abs=1e-6)
        assert len({round(value, 4) for value in found}) > 3
        # The definition's two, the model's on the batch to keep, the Trainer's own; and the base's, if not cached.
        assert [len(step) for step in passes.steps[2:]] == [accumulate + (3 if cached else 4)] * 3
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-2, atol=1e-4)


def test_several_batches_a_step_are_averaged(tmp_path):
    model, batches = adapted(), [keep_batch(seed) for seed in (5, 6)]
    whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    one, several = Gradients(), Gradients()
    train(copy.deepcopy(model), tmp_path / "one", KeepCallback([whole]), one)
    train(model, tmp_path / "several", KeepCallback(batches, batches_per_step=2), several)
    for name, gradient in several.seen[0].items():
        torch.testing.assert_close(gradient, one.seen[0][name], rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped_together(tmp_path):
    gradients = Gradients()
    train(adapted(), tmp_path, KeepCallback([keep_batch()], weight=100.0), gradients, max_grad_norm=0.5)
    norm = torch.stack([gradient.norm() for gradient in gradients.seen[0].values()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)


def test_the_logs_have_the_mean_divergence(tmp_path):
    model, inputs = adapted(), keep_batch()
    before = float(divergence(model, inputs).detach())
    trainer = train(model, tmp_path, KeepCallback([inputs]), steps=2, learning_rate=0.0, logging_steps=2)
    logged = [entry["keep_divergence"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(before, rel=1e-4)]


def test_an_adapter_that_changes_nothing_has_nothing_to_keep(tmp_path):
    base = build("llama")
    model = get_peft_model(base, ActConfig(channels=random_mask(base, 0.3), task_type="CAUSAL_LM"))
    trainer = train(model, tmp_path, KeepCallback([keep_batch()]))
    assert trainer.state.log_history[0]["keep_divergence"] == 0.0


# ---------------------------------------------------------------------------------------------------- the effect ---


@pytest.mark.parametrize("method", ["deltas", "scales", "LoRA"])
def test_the_base_s_answers_are_kept(tmp_path, method):
    rate = 0.2 if method == "scales" else 0.02
    config = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") if method == "LoRA" else None
    settings = {} if method == "LoRA" else {"trainable": method}
    end = {}
    for weight in (None, 100.0):
        torch.manual_seed(0)
        model = adapted(config, **settings)
        base = state_bytes(model.get_base_model())
        callbacks = [] if weight is None else [KeepCallback([keep_batch()], weight)]
        if method == "scales":
            callbacks.append(ScaleSparsityCallback(l1=0.01))
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        train(model, tmp_path / f"{weight}", *callbacks, steps=12, optim="adamw_torch", learning_rate=rate)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
        assert state_bytes(model.get_base_model()) == base or method == "LoRA"
        with torch.no_grad():
            end[weight] = float(divergence(model.eval(), keep_batch()))
    assert end[100.0] < 0.5 * end[None]


def test_with_gradient_checkpointing_and_a_dataloader_of_the_trainer_s(tmp_path):
    model = adapted()
    tokenising = SFTTrainer(
        build("llama"),
        args=training_settings(tmp_path),
        train_dataset=prompt_completion(6),
        processing_class=build_tokenizer(),
    )
    keep = KeepCallback(tokenising.get_train_dataloader())
    trainer = train(model, tmp_path, keep, steps=4, gradient_checkpointing=True)  # two batches, drawn twice
    assert all(entry["keep_divergence"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_what_does_not_train_still_does_not(tmp_path):
    model = adapted()
    model.add_adapter("frozen", ActConfig(channels={"up_proj": [1]}, init_weights=False, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        if name.endswith(".frozen"):
            parameter.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".frozen")}
    train(model, tmp_path, KeepCallback([keep_batch()]), steps=2)
    now = dict(model.named_parameters())
    assert before
    assert all(torch.equal(now[n], tensor) and not now[n].requires_grad for n, tensor in before.items())


def test_a_base_whose_output_layer_trains_is_asked_each_time(tmp_path):
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.get_base_model().lm_head.weight.requires_grad_(True)
    passes = Passes(model.get_base_model().model)
    train(model, tmp_path, passes, KeepCallback([keep_batch()]), steps=3)
    assert [len(step) for step in passes.steps[1:]] == [3, 3]


def test_dropout_is_the_model_s_alone(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM")
    model = adapted(config)
    trainer = train(model, tmp_path, KeepCallback([keep_batch()]), steps=4, learning_rate=0.0)
    found = [entry["keep_divergence"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(found)) == 4
    assert model.training


@pytest.mark.parametrize("moved", [False, True])
def test_a_tracker_sees_the_divergence_if_it_is_called_later(tmp_path, moved):
    class Tracker(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen = (*self.seen, dict(logs))

    keep, tracker = KeepCallback([keep_batch()]), Tracker()
    trainer = SFTTrainer(
        adapted(),
        args=training_settings(tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1),
        train_dataset=prompt_completion(8),
        processing_class=build_tokenizer(),
        callbacks=[tracker, keep],
    )
    if moved:  # as examples/README.md says
        handler = trainer.callback_handler
        handler.callbacks.insert(0, handler.pop_callback(keep))
    trainer.train()
    assert ("keep_divergence" in tracker.seen[0]) == moved
    assert trainer.state.log_history[0]["keep_divergence"] > 0


@pytest.mark.parametrize("method", ["ACT", "LoRA"])
def test_after_a_fitted_transfer_the_base_is_still_the_teacher(tmp_path, method):
    base, donor = build_relatives("llama")
    original = copy.deepcopy(base)
    modules = ["q_proj", "down_proj"]
    fitted = fit(base, donor, [keep_batch(7)], [keep_batch(8)], target_modules=modules, show_progress=False)
    channels = {name: list(range(0, 16, 2)) for name in modules}
    lora = LoraConfig(target_modules=modules, r=4, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora if method == "LoRA" else ActConfig(channels=channels, task_type="CAUSAL_LM"))
    fitted.apply_to(model)
    inputs = keep_batch()
    with torch.no_grad():
        expected = float(divergence(model.eval(), inputs))
        target = original(input_ids=inputs["input_ids"]).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=inputs["input_ids"]).logits, target)
    trainer = train(model, tmp_path, KeepCallback([inputs]), steps=2, learning_rate=0.0)
    found = [entry["keep_divergence"] for entry in trainer.state.log_history if "loss" in entry]
    assert expected > 1e-5
    assert found == pytest.approx([expected] * 2, rel=1e-3)


@pytest.mark.parametrize("again", ["another model", "the same model"])
def test_a_second_training_asks_its_own_base(tmp_path, again):
    keep, first = KeepCallback([keep_batch()]), adapted()
    train(first, tmp_path / "1", keep, learning_rate=0.0)
    second = first if again == "the same model" else adapted(family="qwen2")
    if second is first:
        with torch.no_grad():
            first.get_base_model().model.norm.base_layer.weight.mul_(2)
    trainer = train(second, tmp_path / "2", keep, learning_rate=0.0)
    with torch.no_grad():
        expected = float(divergence(second.eval(), keep_batch()))
    assert trainer.state.log_history[0]["keep_divergence"] == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- refusals ---


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ActValueError, match="KeepCallback: got LlamaForCausalLM, expected a PeftModel"):
        train(build("llama"), tmp_path, KeepCallback([keep_batch()]))


def test_a_backward_pass_that_it_cannot_join_is_refused():
    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    Accelerator(cpu=True)  # as a Trainer begins
    scaled = AcceleratedOptimizer(torch.optim.SGD(parameters), scaler=torch.amp.GradScaler("cpu"))
    for optimizer, what in (
        (scaled, "float16 with a scaled loss"),
        (torch.optim.SGD(copies), "an optimizer without some of the trained parameters"),
    ):
        with pytest.raises(ActValueError, match=f"KeepCallback: got {what}.*, expected bf16 or float32"):
            KeepCallback([keep_batch()]).on_train_begin(None, None, None, model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"), "'default' with bias='all'"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "'default' with PROMPT_TUNING"),
    ],
)
def test_adapters_whose_base_cannot_be_asked_are_refused(config, match, tmp_path):
    model = get_peft_model(build("qwen2"), config)
    with pytest.raises(ActValueError, match=f"KeepCallback: got adapter {match}, expected one that leaves the base"):
        train(model, tmp_path, KeepCallback([keep_batch()]))


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), True, "1"])
def test_a_weight_that_is_none_is_refused(weight):
    error = ActTypeError if isinstance(weight, (str, bool)) else ActValueError
    with pytest.raises(error, match=r"weight: got .*, expected a finite number above 0"):
        KeepCallback([keep_batch()], weight)


@pytest.mark.parametrize("batches", [0, -1, 1.5, True])
def test_less_than_a_batch_is_refused(batches):
    error = ActValueError if type(batches) is int else ActTypeError
    with pytest.raises(error, match=f"batches_per_step: got {batches}, expected an integer of at least 1"):
        KeepCallback([keep_batch()], batches_per_step=batches)


@pytest.mark.parametrize("tokens", [-1, 1.5, True])
def test_a_number_of_cached_tokens_that_is_none_is_refused(tokens):
    error = ActValueError if type(tokens) is int else ActTypeError
    with pytest.raises(error, match=f"max_cached_tokens: got {tokens}, expected an integer of at least 0"):
        KeepCallback([keep_batch()], max_cached_tokens=tokens)


@pytest.mark.parametrize("given", [3, keep_batch()])
def test_what_is_no_dataloader_is_refused(given):
    with pytest.raises(ActTypeError, match=f"keep_dataloader: got {type(given).__name__}, expected an iterable of"):
        KeepCallback(given)


def test_no_batch_is_refused(tmp_path):
    with pytest.raises(ActValueError, match="keep_dataloader: got no batch"):
        train(adapted(), tmp_path / "none", KeepCallback([]))
    with pytest.raises(ActTypeError, match="got generator, expected batches that can be read repeatedly"):
        KeepCallback(b for b in [keep_batch()])


def test_a_batch_without_answers_is_refused(tmp_path):
    empty = {**keep_batch(), "labels": torch.full((4, 8), -100)}
    keep = KeepCallback([keep_batch(), empty])
    with pytest.raises(ActValueError, match="keep_dataloader: batch 1: got no answer token"):
        train(adapted(), tmp_path, keep, steps=2)
    train(adapted(), tmp_path, keep)  # the next one is the first again


def test_tokens_that_the_base_excludes_count_nothing(tmp_path):
    excluded = torch.tensor([7, 9])
    model, plain = adapted(), adapted()
    for tuned in (model, plain):
        for parameter in (p for n, p in tuned.named_parameters() if "lm_head.act_delta" in n):
            parameter.data.zero_()  # so that the same tokens are excluded with the adapter
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda _, __, output: output.index_fill(-1, excluded, float("-inf")))
    inputs = keep_batch()
    inputs["labels"] = inputs["labels"].masked_fill(torch.isin(inputs["labels"], excluded), -100)
    gradients = Gradients()
    trainer = train(model, tmp_path, KeepCallback([inputs], weight=5.0), gradients)
    assert 0 < trainer.state.log_history[0]["keep_divergence"] < 1
    assert all(torch.isfinite(gradient).all() for gradient in gradients.seen[0].values())


def test_a_divergence_that_is_not_finite_is_refused(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.get_base_model().lm_head.act_delta_weight["default"][0] = float("nan")
    with pytest.raises(ActValueError, match="the divergence from the base's answers is nan, expected a finite"):
        train(model, tmp_path, KeepCallback([keep_batch()]))


def test_a_resumed_training_goes_on_with_the_batches_that_follow(tmp_path):
    batches = [keep_batch(seed) for seed in range(3)]

    def run(resume=None):
        model = adapted()
        trainer = SFTTrainer(
            model,
            args=training_settings(tmp_path, max_steps=4, save_strategy="steps", save_steps=1),
            train_dataset=prompt_completion(16),
            processing_class=build_tokenizer(),
            callbacks=[KeepCallback(batches, weight=20.0)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    whole, resumed = run(), run(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_probabilities_are_float32_over_a_bfloat16_model(tmp_path):
    model = adapted().to(torch.bfloat16)
    trainer = train(model, tmp_path, KeepCallback([keep_batch()]), learning_rate=0.0)
    wide = adapted()
    logged = trainer.state.log_history[0]["keep_divergence"]
    assert logged == pytest.approx(float(divergence(wide, keep_batch()).detach()), rel=0.1)
