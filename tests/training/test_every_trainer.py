"""Every trainer of TRL that takes a causal model: rows on the output layer train, as its weight would.

The oracle is the same trainer on a plain model: the merged one, of which the output layer alone trains. Its forward
pass is transformers' own. The first loss and the gradient of the rows are the same, whether a trainer calls the layer
or reads its weight.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from peft import get_peft_model

from act_peft import ActConfig
from tests.support.teaching import Gradients
from tests.support.tiny_data import WORDS, build_tokenizer, conversational, prompt_completion
from tests.support.tiny_models import DECODER, build_relatives, state_bytes
from tests.support.versions import TESTED, skip_as_older

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of trainers that are experimental or deprecated
]
ROWS = 4  # a batch is the whole dataset
SELECTED = list(range(0, 48, 2))
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def numbered(row: Callable[[int], dict[str, Any]]) -> Callable[[], Dataset]:
    return lambda: Dataset.from_list([row(i) for i in range(ROWS)])


def sum_of(i):
    return f"{WORDS[i]} plus {WORDS[i + 1]} is "


def answer(i):
    return " ".join(WORDS[i : i + 1 + i % 3])


def wrong(i):
    return " ".join(WORDS[i + 4 : i + 6 + i % 2])


prompts = numbered(lambda i: {"prompt": f"{WORDS[i]} plus"})
pairs = numbered(lambda i: {"prompt": sum_of(i), "chosen": answer(i), "rejected": wrong(i)})
triples = numbered(lambda i: {"prompt": sum_of(i), "chosen": answer(i), "rejected": wrong(i), "reference": WORDS[i]})
rated = numbered(lambda i: {"prompt": sum_of(i), "completion": answer(i), "label": i % 2 == 0})
privileged = numbered(lambda i: {"prompt": f"{WORDS[i]} plus", "privileged_context": f"it is {WORDS[i + 2]}"})


def prefers_w_words(completions, **_):
    return [float(sum(word.startswith("w") for word in text.split())) for text in completions]


@dataclass(frozen=True)
class Row:
    """One trainer with one kind of loss.

    Attributes:
        name: of the trainer, without its last part.
        data: makes its dataset.
        settings: what is not as in `run`.
        package: of `trl.experimental`.
        needs: "reward", "teacher" or nothing.
        refused: what TRL says about an adapter here.
        older: how versions of TRL before the tested one differ, so that the oracle does not hold there.
    """

    name: str
    data: Callable[[], Dataset]
    settings: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    needs: str | None = None
    refused: str | None = None
    older: str | None = None


def table() -> dict[str, Row]:
    short, online = {"max_length": 48}, {"num_generations": 2, "max_completion_length": 5}
    rows = {
        f"sft {loss}": Row("SFT", lambda: prompt_completion(ROWS), {**short, "loss_type": loss})
        for loss in ("nll", "dft")
    }
    smoothed = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
    for loss in DPO_LOSSES:
        rows[f"dpo {loss}"] = Row("DPO", pairs, {**short, "loss_type": loss, **smoothed.get(loss, {})})
    for loss in ("kto", "apo_zero_unpaired"):
        rows[f"kto {loss}"] = Row("KTO", rated, {**short, "loss_type": loss}, older="measures KTO against the base")
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"):
        level = {"importance_sampling_level": "sequence"} if loss == "luspo" else {}
        settings = {"loss_type": loss, "beta": 0.1, "num_iterations": 2, **online, **level}
        rows[f"grpo {loss}"] = Row("GRPO", prompts, settings, needs="reward")
    rows["grpo with a wide head"] = Row(
        "GRPO",
        prompts,
        {**online, "cast_lm_head_to_fp32": True},
        needs="reward",
        refused="is not supported when the lm_head carries a PEFT",
    )
    answers, chats = {"max_completion_length": 5}, lambda: conversational(ROWS)
    live = {"max_completion_length": 5, "teacher_model_kind": "live"}
    rows |= {
        "rloo": Row("RLOO", prompts, {"beta": 0.1, "num_iterations": 2, **online}, needs="reward"),
        "reward": Row("Reward", pairs, short),
        "distillation": Row("Distillation", prompts, answers, needs="teacher"),
        "cpo": Row("CPO", pairs, short, "cpo"),
        "cpo simpo": Row("CPO", pairs, {**short, "loss_type": "simpo", "cpo_alpha": 0.0}, "cpo"),
        "orpo": Row("ORPO", pairs, short, "orpo"),
        "tpo": Row("TPO", triples, short, "tpo"),
        "gkd": Row("GKD", chats, {**short, "max_new_tokens": 5}, "gkd", "teacher"),
        "gold": Row("GOLD", chats, {**short, **answers, "use_extended_uld": False}, "gold", "teacher"),
        "iw_opd": Row("IWOPD", chats, {**short, **answers}, "iw_opd", "teacher"),
        "gmpo": Row("GMPO", prompts, {"beta": 0.1, **online}, "gmpo", "reward"),
        "a2po": Row("A2PO", prompts, answers, "a2po", "reward"),
        "online_dpo": Row("OnlineDPO", prompts, {"max_new_tokens": 5}, "online_dpo", "reward"),
        "sdft": Row("SDFT", privileged, {**live, "num_generations": 1, "distillation_topk": 10}, "sdft"),
        "sdpo": Row("SDPO", privileged, {**live, "num_generations": 2}, "sdpo", "reward"),
        "sdpo full": Row(
            "SDPO", privileged, {**live, "num_generations": 2, "distillation_mode": "full_logits"}, "sdpo", "reward"
        ),
        "sdpo with a mean teacher": Row(
            "SDPO",
            privileged,
            {**live, "num_generations": 2, "teacher_model_kind": "ema"},
            "sdpo",
            "reward",
            refused="with a non-pure-LoRA PEFT model is not supported",
        ),
    }
    return rows


TABLE = table()
FAST = ("sft dft", "kto kto", "reward", "cpo")  # test_trainers and test_distillation have the other kinds of reading
TIED = ("sft nll", "dpo sigmoid", "kto kto", "grpo dapo", "rloo", "distillation", "gkd", "online_dpo", "orpo")
# The stable trainers under older names, and trainers that need a server beside them and an accelerator.
ELSEWHERE = {"distillation", "kto", "bema_for_ref_model", "async_distillation", "async_grpo", "server_distillation"}


def head_of(row: Row) -> str:
    return "score" if row.name == "Reward" else "lm_head"


def models(row: Row, family: str, folder):
    """A model whose adapter changes its answers already, and the merged one, of which only the head trains."""
    head, selected = head_of(row), SELECTED
    if row.name == "Reward":
        torch.manual_seed(0)
        base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER, num_labels=1)).eval()
        selected = [0]
    else:
        base, donor = build_relatives(family)
        donor.save_pretrained(folder / "teacher")
        build_tokenizer().save_pretrained(folder / "teacher")
    torch.manual_seed(1)
    task = None if row.name == "Reward" else "CAUSAL_LM"
    adapted = get_peft_model(base, ActConfig(channels={head: selected}, init_weights=False, task_type=task))
    with torch.no_grad():
        adapted.get_base_model().get_submodule(head).act_delta_weight["default"].mul_(0.3)
    copy.deepcopy(adapted).merge_and_unload().save_pretrained(folder / "merged")  # trainers load their references
    merged = type(base).from_pretrained(folder / "merged").requires_grad_(False)
    merged.get_submodule(head).weight.requires_grad_(True)
    return adapted, merged, selected


def run(row: Row, model, folder):
    """Two steps; the losses and the gradients of the first one."""
    if row.older is not None and Version(trl.__version__) < Version(TESTED["trl"]):
        skip_as_older("trl", row.older)
    try:
        module = trl if row.package is None else importlib.import_module(f"trl.experimental.{row.package}")
        trainer_class, config_class = (getattr(module, row.name + end) for end in ("Trainer", "Config"))
    except (ImportError, AttributeError):
        skip_as_older("trl", f"has no {row.name}Trainer")
    common = {
        "output_dir": str(folder / "training"),
        "max_steps": 2,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    unknown = row.settings.keys() - inspect.signature(config_class).parameters
    if unknown:
        skip_as_older("trl", f"has no {min(unknown)} for {row.name}Trainer")
    extra: dict[str, Any] = {"reward_funcs": prefers_w_words} if row.needs == "reward" else {}
    if row.needs == "teacher":
        extra["teacher_model"] = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher")
    gradients = Gradients()
    trainer = trainer_class(
        model=model,
        args=config_class(**{**common, **row.settings}),
        train_dataset=row.data(),
        processing_class=build_tokenizer(),
        callbacks=[gradients],
        **extra,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], gradients.seen[0]


def trains_as_its_weight(row: Row, family: str, folder):
    adapted, merged, selected = models(row, family, folder)
    head, before = head_of(row), state_bytes(adapted.get_base_model())
    rows = adapted.get_base_model().get_submodule(head).act_delta_weight["default"]
    first = rows.detach().clone()
    if row.refused is not None:
        with pytest.raises(ValueError, match=row.refused):
            run(row, adapted, folder)
        return
    losses, found = run(row, adapted, folder)
    expected_losses, expected = run(row, merged, folder)
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5, abs=1e-6)
    (gradient,) = (values for name, values in found.items() if f"{head}.act_delta_weight" in name)
    (whole,) = (values for name, values in expected.items() if name.endswith(f"{head}.weight"))
    torch.testing.assert_close(gradient, whole[selected], **TOLERANCE)
    assert whole[selected].abs().max() > 1e-4
    assert (rows != first).any()
    after = state_bytes(adapted.get_base_model())
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", FAST)
def test_rows_on_the_output_layer_train_as_its_weight_would(name, tmp_path):
    trains_as_its_weight(TABLE[name], "llama", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if name not in FAST])
def test_rows_on_the_output_layer_train_as_its_weight_would_with_every_other_trainer(name, tmp_path):
    trains_as_its_weight(TABLE[name], "llama", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_rows_on_a_tied_output_layer_train_alone(name, tmp_path):
    trains_as_its_weight(TABLE[name], "gemma", tmp_path)


def test_the_table_has_every_trainer():
    stable = {row.name for row in TABLE.values() if row.package is None}
    there = {name.removesuffix("Trainer") for name in dir(trl) if name.endswith("Trainer")}
    experimental = Path(trl.__file__).parent / "experimental"
    packages = {module.name for module in pkgutil.iter_modules([str(experimental)]) if module.ispkg}
    with_trainer = {
        name
        for name in packages
        if any(each.endswith("Trainer") for each in dir(importlib.import_module(f"trl.experimental.{name}")))
    }
    missing = (there - stable) | (with_trainer - {row.package for row in TABLE.values()} - ELSEWHERE)
    if missing:
        skip_as_older("trl", f"has trainers that are not in the table: {sorted(missing)}")
