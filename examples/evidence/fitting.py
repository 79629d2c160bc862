"""The donor's difference fitted in closed form (`act_peft.fit`), and what can be made of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import selection
from measure import Row
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from selection import LINEAR
from study import Study

from act_peft import FittedTransfer, fit

Setting = Mapping[str, Any]
Judge = Callable[[Setting, Any, int], None]
Try = Callable[[Study, list[Setting], Judge], None]
RANK = 64  # the highest that an adapter is made of
DEFAULTS = {"keep_weight": 1.0, "ridge": 0.03, "prior_scale": 0.0}  # where fine-tunes start
SHARE = 0.2  # of every module's rows, and of the tokens
KEPT_FITS = 4  # half a gigabyte each

_fits: dict[tuple[Any, ...], FittedTransfer] = {}


def fitted(study: Study, setting: Setting, rows: Sequence[Row] | None = None, **options: Any) -> FittedTransfer:
    """The fit of one setting; the last ones are kept, since several methods start from the same.

    Args:
        study: Gives models and examples.
        setting: Of `fit`.
        rows: Examples of the ability, by default the study's.
        options: More of `fit`'s arguments.
    """
    chosen = study.ability() if rows is None else list(rows)
    key = (study.name, study.seed, tuple(chosen), tuple(setting.items()), tuple(options.items()))
    if key not in _fits:
        while len(_fits) >= KEPT_FITS:
            del _fits[next(iter(_fits))]
        _fits[key] = fit(
            study.reference,
            study.donor,
            study.batches(chosen),
            study.batches(study.kept()),
            max_rank=RANK,
            show_progress=False,
            **setting,
            **options,
        )
    return _fits[key]


def _whole(study: Study, found: FittedTransfer) -> Any:
    """The base with every change."""
    model = study.base()
    found.add_to_(model)
    return models.halved(model).requires_grad_(False)


def _all_numbers(study: Study) -> int:
    return sum(parameter.numel() for parameter in study.reference.parameters())


@contextmanager
def _scratch(study: Study) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        yield Path(folder) / "adapter"


def _stored(folder: Path) -> int:
    """How many values an adapter's file holds, its indices left out."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        return sum(_product(part.get_shape()) for part in shapes if not part.get_dtype().startswith("I"))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _merged(study: Study, folder: Path) -> Any:
    """The base with an adapter merged in."""
    model = PeftModel.from_pretrained(study.base(), folder).merge_and_unload()
    return models.halved(model).requires_grad_(False)


# ------------------------------------------------------------------------------------------ nothing is trained ---


def everything(study: Study, settings: list[Setting], judge: Judge) -> None:
    """All changes: of linear layers, norms and the tied embedding."""
    for setting in settings:
        judge(setting, _whole(study, fitted(study, setting)), _all_numbers(study))


def with_examples(count: int) -> Try:
    """The same of so many examples of the ability."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        for setting in settings:
            judge(setting, _whole(study, fitted(study, setting, study.ability(count))), _all_numbers(study))

    return try_settings


def on_general_prompts(study: Study, settings: list[Setting], judge: Judge) -> None:
    """The same of a dozen everyday requests, none of them of the ability."""
    for setting in settings:
        judge(setting, _whole(study, fitted(study, setting, study.general())), _all_numbers(study))


def on_answer_tokens(study: Study, settings: list[Setting], judge: Judge) -> None:
    """The same where the inputs of answer tokens alone count."""
    for setting in settings:
        judge(setting, _whole(study, fitted(study, setting, positions="answer")), _all_numbers(study))


def linear_layers_alone(study: Study, settings: list[Setting], judge: Judge) -> None:
    """Neither embedding nor norms."""
    for setting in settings:
        judge(setting, _whole(study, fitted(study, setting, target_modules=tuple(LINEAR))), _all_numbers(study))


def best_rows(scope: str) -> Try:
    """An ACT adapter of the best fifth of every module's rows (or of all together) and of the tokens."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        for setting in settings:
            found = fitted(study, setting)
            with _scratch(study) as folder:
                found.to_adapter(found.gains.top(SHARE, scope=scope), folder, tokens=SHARE)
                judge(setting, _merged(study, folder), _stored(folder))

    return try_settings


def fitted_rows(kind: str) -> Try:
    """The fitted change of a fifth of every linear layer's rows; embedding and norms stay."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        for setting in settings:
            found = fitted(study, setting)
            if kind == "gain":
                mask = selection.linear_only(found.gains.top(SHARE, scope="module"))
            else:
                mask = selection.select(study, kind, SHARE)
            with _scratch(study) as folder:
                found.to_adapter(mask, folder)
                judge(setting, _merged(study, folder), _stored(folder))

    return try_settings


def of_rank(rank: int, *, norms: bool = False, tokens: float | None = None) -> Try:
    """An ordinary LoRA adapter."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        for setting in settings:
            with _scratch(study) as folder:
                fitted(study, setting).to_lora(rank, folder, norms=norms, tokens=tokens)
                judge(setting, _merged(study, folder), _stored(folder))

    return try_settings


def of_rank_with_embedding(rank: int) -> Try:
    """An ordinary LoRA adapter that has factors of the tied embedding too; it is not merged."""

    def try_settings(study: Study, settings: list[Setting], judge: Judge) -> None:
        for setting in settings:
            with _scratch(study) as folder:
                fitted(study, setting).to_lora(rank, folder, embedding_rank=rank)
                judge(setting, PeftModel.from_pretrained(study.frozen_base(), folder), _stored(folder))

    return try_settings


def channels_by_gain(study: Study, settings: list[Setting], judge: Judge) -> None:
    """λ of the difference itself in the channels of the greatest gains: the score without the change."""
    gains = fitted(study, DEFAULTS).gains
    for setting in settings:
        mask = selection.linear_only(gains.top(setting["density"], scope="module"))
        model = models.halved(selection.moved(study, mask, setting["scale"]))
        judge(setting, model, selection.numbers(study, mask))


# ---------------------------------------------------------------------------------------- starts of a fine-tune ---


def lora_on_everything(study: Study) -> Any:
    """A fresh LoRA on the base with all changes in it."""
    model = _whole(study, fitted(study, DEFAULTS))
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))


def trainable_lora(study: Study) -> Any:
    """The fit as a LoRA of rank 16 with a fifth of the tokens, all of which train."""
    with _scratch(study) as folder:
        fitted(study, DEFAULTS).to_lora(16, folder, tokens=SHARE)
        return PeftModel.from_pretrained(study.frozen_base(), folder, is_trainable=True)


def trainable_rows(study: Study) -> Any:
    """The fit as an ACT adapter of the best fifth of the rows and of the tokens, all of which train."""
    found = fitted(study, DEFAULTS)
    with _scratch(study) as folder:
        found.to_adapter(found.gains.top(SHARE, scope="module"), folder, tokens=SHARE)
        return PeftModel.from_pretrained(study.frozen_base(), folder, is_trainable=True)
