"""The methods: what each does to a base, and the settings that are tried for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from act_peft import ActConfig, ChannelMask
from act_peft.demo.words import Language
from act_peft.training.prune import prune_channels
from act_peft.training.scales import soft_threshold_
from tests.benchmarks.recovery.families import Encoded, Family
from tests.benchmarks.recovery.merging import with_dare, with_task_arithmetic, with_ties
from tests.benchmarks.recovery.training import Loop

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

Setting = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What every trained method may spend.

    Attributes:
        steps: Optimizer steps in all.
        row_steps: How many of them fine-tune rows in the method that first learns scales.
        batch_size: Examples in a step.
    """

    steps: int
    row_steps: int
    batch_size: int


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        build: (family, budget, setting) -> the finished model.
        settings: Those that are tried.
    """

    build: Callable[[Family, Budget, Setting], Any]
    settings: list[Setting]


def grid(**choices: list[Any]) -> list[Setting]:
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# ------------------------------------------------------------------------------------------------------- channels ---


def paper_mask(family: Family, density: float) -> ChannelMask:
    """The top channels of all modules together, as in the paper."""
    return family.activation_scores.top(density)


def quota_mask(family: Family, density: float) -> ChannelMask:
    """The same share of every module."""
    return family.activation_scores.top(density, scope="module")


def random_mask(family: Family, density: float) -> ChannelMask:
    """As many channels of every module, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    mask = quota_mask(family, density)
    channels = {
        name: torch.randperm(count, generator=generator)[: mask[name].numel()]
        for name, count in mask.num_channels.items()
    }
    return ChannelMask.from_dict(channels, mask.num_channels)


Select = Callable[[Family, float], ChannelMask]


# -------------------------------------------------------------------------------------------------------- methods ---


def transferred(family: Family, mask: ChannelMask, scale: float, *, trainable: str = "deltas") -> Any:
    """The base with an ACT adapter that holds λ times the donor's difference."""
    config = ActConfig(channels=mask, donor=family.donor_folder, transfer_scale=scale, trainable=trainable)
    return get_peft_model(family.base(), config)


def transfer(family: Family, budget: Budget, setting: Setting) -> Any:
    """The paper's transfer, without any training."""
    return transferred(family, paper_mask(family, setting["density"]), setting["scale"])


def _examples(family: Family, setting: Setting) -> Mapping[Language, Encoded]:
    return family.anchored if setting.get("anchored") else family.training


def _fine_tuned(model: Any, family: Family, budget: Budget, setting: Setting) -> Any:
    """The model after the whole budget at the setting's rate and share of the skill to keep."""
    loop = Loop(budget.steps, setting["rate"], setting["keep_share"], batch_size=budget.batch_size)
    loop.run(model, _examples(family, setting))
    return model


def row_fine_tune(select: Select) -> Callable[[Family, Budget, Setting], Any]:
    """Transfer with one fixed λ, then a fine-tune of the selected rows."""

    def build(family: Family, budget: Budget, setting: Setting) -> Any:
        model = transferred(family, select(family, setting["density"]), setting["scale"])
        return _fine_tuned(model, family, budget, setting)

    return build


def lora(family: Family, budget: Budget, setting: Setting) -> Any:
    """LoRA of rank 8 on every linear layer, the output layer included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(family.base(), LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))
    return _fine_tuned(model, family, budget, setting)


def full_fine_tune(family: Family, budget: Budget, setting: Setting) -> Any:
    """All parameters train."""
    return _fine_tuned(family.base(), family, budget, setting)


def learned_scales(density: float, steps: Callable[[Budget], int]) -> Callable[[Family, Budget, Setting], Any]:
    """One scale per channel on the donor's frozen difference, in [0, 1] and sparse."""

    def build(family: Family, budget: Budget, setting: Setting) -> Any:
        model = transferred(family, quota_mask(family, density), setting["init"], trainable="scales")
        scales = [parameter for parameter in model.parameters() if parameter.requires_grad]  # nothing else trains

        def sparsify(rate: float) -> None:
            for values in scales:
                soft_threshold_(values, rate * setting["l1"], bounds=(0.0, 1.0))

        loop = Loop(steps(budget), setting["rate"], setting["keep_share"], batch_size=budget.batch_size)
        loop.run(model, _examples(family, setting), sparsify)
        return model

    return build


def scales_then_rows(family: Family, budget: Budget, setting: Setting) -> Any:
    """Learned scales of all channels; those that stay get their rows fine-tuned."""
    model = learned_scales(1.0, lambda budget: budget.steps - budget.row_steps)(family, budget, setting)
    prune_channels(model, threshold=setting.get("threshold", 0.0))
    loop = Loop(budget.row_steps, setting["row_rate"], setting["keep_share"], batch_size=budget.batch_size, seed=1)
    loop.run(model, _examples(family, setting))
    return model


def fitted(family: Family, budget: Budget, setting: Setting) -> Any:
    """The donor's difference in closed form, in all weights, without any training."""
    base = family.base()
    family.fitted(setting["keep_weight"]).add_to_(base)
    return base


def fitted_then_rows(family: Family, budget: Budget, setting: Setting) -> Any:
    """The channels with the greatest gains, filled by the fit; then a fine-tune of these rows."""
    fit = family.fitted(setting["keep_weight"])
    mask = fit.gains.top(setting["density"], scope="module")
    model = get_peft_model(family.base(), ActConfig(channels=mask))
    fit.apply_to(model)
    share = setting.get("keep_share", 3 / 4)
    loop = Loop(min(setting["steps"], budget.steps), setting["rate"], share, batch_size=budget.batch_size)
    loop.run(model, _examples(family, setting))
    return model


FITTED = grid(keep_weight=[1.0, 2.0, 3.0, 5.0, 10.0])
FITTED_AND_ROWS = [
    {"keep_weight": 3.0, "density": 0.5, "rate": 5e-4, "steps": 75},
    {"keep_weight": 2.0, "density": 0.5, "rate": 5e-4, "steps": 75},
    {"keep_weight": 3.0, "density": 0.5, "rate": 5e-4, "steps": 150},
    {"keep_weight": 2.0, "density": 1.0, "rate": 5e-4, "steps": 75},
    {"keep_weight": 1.0, "density": 0.5, "rate": 5e-4, "steps": 150},
]
# The fine-tune brings back what is kept, so the fit need not: a small weight takes more of the donor.
FREELY_FITTED_AND_ROWS = [
    {"keep_weight": weight, "density": 0.5, "rate": 5e-4, "steps": 150, "keep_share": 0.85}
    for weight in (0.2, 0.1, 0.3, 0.5, 1.0)
]
# Rates times shares of the skill to keep, around what was best when they were looked for.
ROWS = [
    {"density": 0.4, "scale": 0.3, "rate": 1e-3, "keep_share": 1 / 2},
    {"density": 0.4, "scale": 0.3, "rate": 5e-4, "keep_share": 1 / 2},
    {"density": 0.4, "scale": 0.3, "rate": 5e-4, "keep_share": 3 / 4},
    {"density": 0.4, "scale": 0.2, "rate": 1e-3, "keep_share": 3 / 4},
    {"density": 0.2, "scale": 0.3, "rate": 1e-3, "keep_share": 3 / 4},
]
LORA = [
    {"rate": 2e-3, "keep_share": 1 / 2},
    {"rate": 2e-3, "keep_share": 3 / 4},
    {"rate": 1e-3, "keep_share": 1 / 2},
    {"rate": 1e-3, "keep_share": 3 / 4},
    {"rate": 4e-3, "keep_share": 3 / 4},
]
FULL = [
    {"rate": 5e-4, "keep_share": 1 / 2},
    {"rate": 5e-4, "keep_share": 3 / 4},
    {"rate": 2.5e-4, "keep_share": 1 / 2},
    {"rate": 2.5e-4, "keep_share": 3 / 4},
    {"rate": 1e-3, "keep_share": 3 / 4},
]
SCALES = [
    {"init": 0.2, "rate": 0.05, "l1": 0.1, "keep_share": 3 / 4},
    {"init": 0.2, "rate": 0.05, "l1": 0.1, "keep_share": 1 / 2},
    {"init": 0.2, "rate": 0.05, "l1": 0.2, "keep_share": 1 / 2},
    {"init": 0.2, "rate": 0.05, "l1": 0.15, "keep_share": 3 / 4},
    {"init": 0.2, "rate": 0.05, "l1": 0.05, "keep_share": 4 / 5},
]
SCALES_AND_ROWS = [
    {"init": 0.2, "rate": 0.05, "l1": 0.1, "keep_share": 3 / 4, "row_rate": 5e-4},
    {"init": 0.2, "rate": 0.05, "l1": 0.1, "keep_share": 3 / 4, "row_rate": 1e-3},
    {"init": 0.2, "rate": 0.05, "l1": 0.1, "keep_share": 2 / 3, "row_rate": 5e-4},
    {"init": 0.2, "rate": 0.05, "l1": 0.15, "keep_share": 3 / 4, "row_rate": 5e-4},
    {"init": 0.2, "rate": 0.05, "l1": 0.1, "keep_share": 2 / 3, "row_rate": 1e-3, "threshold": 0.1},
]


def anchored(settings: list[Setting]) -> list[Setting]:
    """The same with the base's own answers on the skill to keep in place of labels, as `KeepCallback` does it."""
    return [{**setting, "anchored": True} for setting in settings]


METHODS = {
    "base": Method(lambda family, budget, setting: family.base(), [{}]),
    "donor": Method(lambda family, budget, setting: family.donor(), [{}]),
    "task arithmetic": Method(
        lambda family, budget, setting: with_task_arithmetic(family, **setting),
        grid(scale=[0.05, 0.1, 0.2, 0.35, 0.5, 0.6]),
    ),
    "TIES": Method(
        lambda family, budget, setting: with_ties(family, **setting), grid(density=[0.3, 0.7], scale=[0.05, 0.15, 0.4])
    ),
    "DARE": Method(
        lambda family, budget, setting: with_dare(family, **setting), grid(density=[0.7, 0.9], scale=[0.05, 0.1, 0.35])
    ),
    "fitted, no training": Method(fitted, FITTED),
    "ACT as in the paper, transfer only": Method(transfer, grid(density=[0.1, 0.3], scale=[0.1, 0.2, 0.4])),
    "ACT as in the paper": Method(row_fine_tune(paper_mask), ROWS),
    "ACT, share of every module": Method(row_fine_tune(quota_mask), ROWS),
    "random channels": Method(row_fine_tune(random_mask), ROWS),
    "LoRA, rank 8": Method(lora, LORA),
    "full fine-tune": Method(full_fine_tune, FULL),
    "learned scales": Method(learned_scales(1.0, lambda budget: budget.steps), SCALES),
    "learned scales, top 40%": Method(learned_scales(0.4, lambda budget: budget.steps), SCALES),
    "learned scales, pruned, rows": Method(scales_then_rows, SCALES_AND_ROWS),
    "LoRA, rank 8, anchored": Method(lora, anchored(LORA)),
    "full fine-tune, anchored": Method(full_fine_tune, anchored(FULL)),
    "ACT, share of every module, anchored": Method(row_fine_tune(quota_mask), anchored(ROWS)),
    "random channels, anchored": Method(row_fine_tune(random_mask), anchored(ROWS)),
    "learned scales, anchored": Method(learned_scales(1.0, lambda budget: budget.steps), anchored(SCALES)),
    "learned scales, pruned, rows, anchored": Method(scales_then_rows, anchored(SCALES_AND_ROWS)),
    "fitted, then rows, anchored": Method(fitted_then_rows, anchored(FITTED_AND_ROWS)),
    "fitted freely, then rows, anchored": Method(fitted_then_rows, anchored(FREELY_FITTED_AND_ROWS)),
}
