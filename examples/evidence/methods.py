"""The methods: what each makes of a base, the settings that are tried for it, and how much it has to store."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fitting
import merging
import models
import selection
import torch
from peft import LoraConfig, get_peft_model
from selection import LINEAR
from study import Study
from training import Recipe, fine_tune

from act_peft import ActConfig, ScaleSparsityCallback

Setting = Mapping[str, Any]
Judge = Callable[[Setting, Any, int], None]  # setting, model, numbers to store
STEPS = 30  # of every fine-tune; all of them are looked at half way, too


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        try_settings: (study, settings, judge): shows the judge a model for each setting.
        settings: Those that are tried.
        like: The method whose chosen setting is the only one that is tried.
        drawn: Whether the seed makes a difference (it draws examples, masks and batches).
        finalist: Whether all seeds are run unless others are asked for.
    """

    try_settings: Callable[[Study, list[Setting], Judge], None]
    settings: list[Setting]
    like: str | None = None
    drawn: bool = True
    finalist: bool = False


def grid(**choices: list[Any]) -> list[Setting]:
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def fixed(build: Callable[..., Any]) -> Callable[[Study, list[Setting], Judge], None]:
    """Methods whose model is the base with other weights of the same shapes: all of them are stored."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        total = sum(parameter.numel() for parameter in study.reference.parameters())
        for setting in settings:
            judge(setting, models.halved(build(study, **setting)).requires_grad_(False), total)

    return try_settings


# ------------------------------------------------------------------------------------------- selected channels ---


def channels(kind: str) -> Callable[[Study, list[Setting], Judge], None]:
    """λ of the difference in the best channels of every linear layer."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        found = None if kind == "random" else selection.scores(study, kind)
        for setting in settings:
            density = setting["density"]
            mask = selection.random_mask(study, density) if found is None else found.top(density, scope="module")
            judge(
                setting, models.halved(selection.moved(study, mask, setting["scale"])), selection.numbers(study, mask)
            )

    return try_settings


def paper(study: Study, settings: list[Setting], judge: Judge) -> None:
    """The paper's transfer: one ranking of all channels."""
    found = selection.paper_scores(study)
    for setting in settings:
        mask = found.top(setting["density"])
        judge(setting, models.halved(selection.moved(study, mask, setting["scale"])), selection.numbers(study, mask))


# -------------------------------------------------------------------------------------------------- fine-tunes ---


def trained(
    build: Callable[[Study], Any],
    *,
    ability: str = "labels",
    kept: str = "base",
    base_inside: bool = True,
    callbacks: Callable[[], list[Any]] = list,
) -> Callable[[Study, list[Setting], Judge], None]:
    """A fine-tune of what the model lets train; its settings are learning rates and numbers of steps."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        for rate in dict.fromkeys(setting["rate"] for setting in settings):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(study.seed)
                model = build(study)
            count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            steps = [setting["steps"] for setting in settings if setting["rate"] == rate]
            after = {step: _shown(judge, {"rate": rate, "steps": step}, count) for step in steps}
            recipe = Recipe(rate, max(steps), ability, kept)
            fine_tune(model, study, recipe, callbacks=callbacks(), base_inside=base_inside, after=after)

    return try_settings


def _shown(judge: Judge, setting: Setting, count: int) -> Callable[[Any], None]:
    return lambda model: judge(setting, model, count)


def with_lora(model: Any, rank: int = 8) -> Any:
    """LoRA on every linear layer."""
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR))


def lora(study: Study) -> Any:
    """LoRA of rank 8 on the base."""
    return with_lora(study.frozen_base())


def lora_on_interpolation(study: Study) -> Any:
    """The same, started from a third of the way to the donor."""
    return with_lora(models.halved(merging.interpolation(study, scale=0.35)))


def paper_rows(study: Study) -> Any:
    """ACT with the paper's settings: 9% of all channels, λ = 0.7."""
    config = ActConfig(channels=selection.paper_scores(study).top(0.09), donor=study.donor_folder, transfer_scale=0.7)
    return get_peft_model(study.frozen_base(), config)


def rows(kind: str, scale: float = 0.5) -> Callable[[Study], Any]:
    """ACT: 5% of the channels of every linear layer, with λ of the donor's difference to begin with."""

    def build(study: Study) -> Any:
        mask = selection.select(study, kind, 0.05)
        return get_peft_model(
            study.frozen_base(), ActConfig(channels=mask, donor=study.donor_folder, transfer_scale=scale)
        )

    return build


def scales(study: Study) -> Any:
    """One scale for each channel of every linear layer on the donor's frozen difference."""
    modules = {name: list(range(module.out_features)) for name, module in selection.linear_layers(study.reference)}
    config = ActConfig(channels=modules, donor=study.donor_folder, transfer_scale=0.2, trainable="scales")
    return get_peft_model(study.frozen_base(), config)


RATES = {"lora": [1e-3, 3e-3], "full": [5e-5, 2e-4], "rows": [1e-3, 3e-4], "scales": [5e-2, 2e-2]}


def short(kind: str) -> list[Setting]:
    """Two learning rates, each looked at half way and at the end."""
    return grid(rate=RATES[kind], steps=[STEPS // 2, STEPS])


# ------------------------------------------------------------------------------------------------------ the table ---

CHANNELS = grid(density=[0.05, 0.2], scale=[0.5, 1.0])
FITTED = [
    {"keep_weight": 1.0, "ridge": 0.03, "prior_scale": 0.0},
    {"keep_weight": 3.0, "ridge": 0.03, "prior_scale": 0.0},
    {"keep_weight": 10.0, "ridge": 0.03, "prior_scale": 0.0},
    {"keep_weight": 1.0, "ridge": 3.0, "prior_scale": 0.65},
]

METHODS = {
    "base": Method(fixed(lambda study: study.base()), [{}], drawn=False),
    "donor": Method(fixed(lambda study: copy.deepcopy(study.donor)), [{}], drawn=False),
    # Weights alone.
    "interpolation": Method(fixed(merging.interpolation), grid(scale=[0.15, 0.35, 0.5, 0.65]), drawn=False),
    "TIES": Method(fixed(merging.ties_merge), grid(density=[0.3, 0.5], scale=[0.2, 0.35]), drawn=False),
    "DARE": Method(fixed(merging.dare_merge), grid(density=[0.5, 0.8], scale=[0.15, 0.2])),
    "LiNeS": Method(
        fixed(merging.by_depth),
        [
            {"first": 0.0, "last": 0.4},
            {"first": 0.1, "last": 0.3},
            {"first": 0.3, "last": 0.1},
            {"first": 0.4, "last": 0.0},
        ],
        drawn=False,
    ),
    "layer swap": Method(
        fixed(merging.layer_swap),
        [{"bottom": 3, "top": 0}, {"bottom": 0, "top": 3}, {"bottom": 6, "top": 0}, {"bottom": 0, "top": 6}],
        drawn=False,
    ),
    "embedding and norms alone": Method(
        fixed(merging.embedding_and_norms), grid(scale=[0.2, 0.35, 0.5, 0.7]), drawn=False
    ),
    # Selected channels, nothing trains.
    "paper's ACT": Method(paper, grid(density=[0.01, 0.05], scale=[0.4, 1.0])),
    "channels at random": Method(channels("random"), CHANNELS),
    "channels by activation": Method(channels("activation"), CHANNELS),
    "channels by weight": Method(channels("weight"), CHANNELS, drawn=False),
    "channels by attribution": Method(channels("attribution"), CHANNELS),
    "channels by contrast": Method(channels("contrast"), CHANNELS),
    "channels by gain": Method(fitting.channels_by_gain, CHANNELS),
    # The closed form, nothing trains.
    "fitted": Method(fitting.everything, FITTED, finalist=True),
    "fitted, best 20% of rows and tokens": Method(fitting.best_rows("module"), FITTED, like="fitted", finalist=True),
    "fitted, best 20% of all rows together, and tokens": Method(fitting.best_rows("global"), FITTED, like="fitted"),
    "fitted, rank 4": Method(fitting.of_rank(4), FITTED, like="fitted"),
    "fitted, rank 16": Method(fitting.of_rank(16), FITTED, like="fitted", finalist=True),
    "fitted, rank 64": Method(fitting.of_rank(64), FITTED, like="fitted"),
    "fitted, rank 16, embedding too": Method(fitting.of_rank_with_embedding(16), FITTED, like="fitted", finalist=True),
    "fitted, rank 16, norms, 20% of tokens": Method(
        fitting.of_rank(16, norms=True, tokens=0.2), FITTED, like="fitted", finalist=True
    ),
    "fitted, linear layers alone": Method(fitting.linear_layers_alone, FITTED, like="fitted"),
    "fitted rows by gain, linear layers alone": Method(fitting.fitted_rows("gain"), FITTED, like="fitted"),
    "fitted rows by activation, linear layers alone": Method(fitting.fitted_rows("activation"), FITTED, like="fitted"),
    "fitted rows at random, linear layers alone": Method(fitting.fitted_rows("random"), FITTED, like="fitted"),
    "fitted on general prompts": Method(fitting.on_general_prompts, FITTED, like="fitted"),
    "fitted on answer tokens": Method(fitting.on_answer_tokens, FITTED, like="fitted"),
    **{
        f"fitted, {count} examples": Method(fitting.with_examples(count), FITTED, like="fitted")
        for count in (3, 10, 30, 300)
    },
    # Fine-tunes.
    "LoRA, labels": Method(trained(lora, kept="labels"), short("lora")),
    "LoRA, base keeps": Method(trained(lora), short("lora"), finalist=True),
    "LoRA, donor teaches, base keeps": Method(trained(lora, ability="donor"), short("lora")),
    "LoRA from interpolation, base keeps": Method(
        trained(lora_on_interpolation, base_inside=False), short("lora"), finalist=True
    ),
    "full fine-tune, labels": Method(trained(Study.base, kept="labels"), short("full")),
    "full fine-tune, base keeps": Method(trained(Study.base), short("full")),
    "paper's ACT, then labels": Method(trained(paper_rows, kept="nothing"), short("rows")),
    "rows by activation, base keeps": Method(trained(rows("activation")), short("rows"), finalist=True),
    "rows at random, base keeps": Method(trained(rows("random")), short("rows")),
    "rows by activation, donor teaches, base keeps": Method(
        trained(rows("activation"), ability="donor"), short("rows")
    ),
    "learned scales, base keeps": Method(
        trained(scales, callbacks=lambda: [ScaleSparsityCallback(1e-3)]), short("scales")
    ),
    # The closed form, then a fine-tune.
    "fitted, then LoRA, base keeps": Method(
        trained(fitting.lora_on_everything, base_inside=False), short("lora"), finalist=True
    ),
    "fitted, then LoRA, donor teaches, base keeps": Method(
        trained(fitting.lora_on_everything, ability="donor", base_inside=False), short("lora")
    ),
    "fitted rank 16, then trained, base keeps": Method(trained(fitting.trainable_lora), short("lora"), finalist=True),
    "fitted rows, then trained, base keeps": Method(trained(fitting.trainable_rows), short("rows"), finalist=True),
}
"""By name, in the order of the tables."""
