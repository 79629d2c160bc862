"""Combine several ACT adapters of one base into one, with a weight for each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from act_peft.adapter.changes import OtherTensor, changes_in_folder
from act_peft.adapter.config import ActConfig, record_adapter
from act_peft.adapter.file import TENSORS, AdapterFolder
from act_peft.combination.conflicts import ConflictReport, Conflicts
from act_peft.combination.rules import CombinationType, MajoritySign, Rule, make_rule
from act_peft.combination.same_base import different_bases, records, records_on, tensors_of_base
from act_peft.combination.union import Source, UnionModule, union_modules
from act_peft.combination.weighting import Weighted, checked_weights, weighted_adapters
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.folders import check_output, check_room
from act_peft.disk.writing import size_of, write_tensors
from act_peft.doors import OUTER
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.layers.changes import changes_in_model
from act_peft.layers.deltas import PREFIX
from act_peft.plain import in_markdown

_SLACK = 1 << 20  # bytes kept free for configuration and card


@dataclass(frozen=True)
class Combined:
    """What `combine` wrote.

    Attributes:
        folder: the adapter's folder.
        num_modules: number of modules with channels.
        num_channels: number of channels.
        conflicts: the channels that several adapters change, see `find_conflicts`.
    """

    folder: Path
    num_modules: int
    num_channels: int
    conflicts: ConflictReport


# --------------------------------------------------------------------------------------------------------- on disk ---


def combine(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    combination_type: str | CombinationType = CombinationType.LINEAR,
    density: float | None = None,
    majority_sign_method: str | MajoritySign = MajoritySign.TOTAL,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Combined:
    """Combine saved ACT adapters of one base into one adapter, without a model.

        delta[i] = Σ weight * delta_adapter[i]      over the adapters that have channel i       ("linear", "sum")

    (eq. 5 of arXiv 2601.09398.) The result has the channels of all adapters. A channel of only one adapter gets
    weight * delta with every type. The type matters for channels that several adapters share, see `CombinationType`.
    Pruning (`density`) affects shared channels only, separately for each module and each set of adapters that share
    channels there; a bias element belongs to the row of its channel. The two DARE types use torch's global random
    generator (`torch.manual_seed`). The deltas are float32, or wider if an adapter has wider ones.

    The tensors are equal, bit for bit, to those of `model.add_weighted_adapter` and `save_pretrained`. The deltas are
    read and written module by module. `PeftModel.from_pretrained` loads the folder; its card lists adapters and
    weights.

    Args:
        adapters: folders or Hub ids of ACT adapters: one, several, or name -> folder.
        output_dir: the folder to write. After an error there is no folder.
        weights: a factor for each adapter, in the order of `adapters` or by name; 1 by default.
        combination_type: a `CombinationType` or its value.
        density: share of the values that the pruning types keep, in (0, 1]; for `"ties"`, `"dare_linear"`,
            `"dare_ties"` and `"magnitude_prune"`, and only for them.
        majority_sign_method: `"total"` or `"frequency"`, for `"ties"` and `"dare_ties"`.
        base: folder or Hub id of the base's checkpoint. With it the result records fingerprints of the base for all
            modules; without it only for modules where one of the adapters has all the channels.
        overwrite: whether an older adapter at `output_dir` is replaced.

    Returns:
        The folder, its size, and the conflicts between the adapters.

    Raises:
        ActValueError: a missing or damaged adapter or base; settings that contradict each other; deltas that are not
            finite; an output that exists or lies inside an input; not enough disk space. Then nothing is written.
        ActLoadError: adapters of different models, adapters that do not fit the base, or that bring different
            embeddings of it.
        ActTypeError: a weight or density that is no number.

    Warns:
        ActWarning: once, if the adapters name different bases or were made for bases with other weights.

    Example:
        >>> combined = combine({"sums": "math", "programs": "code"}, "both", weights={"sums": 1.0, "programs": 0.5})
        >>> model = PeftModel.from_pretrained(base, "both")
        >>> print(combined.conflicts.only_totals())
    """
    rule = make_rule(combination_type, density=density, majority_sign_method=majority_sign_method)
    chosen = weighted_adapters(adapters, weights)
    output = Path(os.path.abspath(output_dir))
    with ExitStack() as stack:
        sources = _open(stack, chosen)
        checkpoint = None if base is None else stack.enter_context(Checkpoint.open(base))
        inputs = [folder for source in sources for folder in source.changes.inputs]
        check_output(output, [*inputs, *([] if checkpoint is None else [checkpoint.folder])], overwrite=overwrite)
        modules = union_modules(sources)
        notes = list(different_bases(sources, by_names=checkpoint is None))
        settings = combined_settings(sources)
        settings.inference_mode = True
        if checkpoint is None:
            recorded = records(modules, sources)
        else:
            recorded, differing = records_on(checkpoint, modules, sources)
            notes += differing
        record_adapter(settings, recorded)
        others = tensors_of_base(sources, {module.name for module in modules})
        infos = _infos(modules, others)
        check_room(output, size_of(infos) + _SLACK)
        conflicts = Conflicts([source.name for source in sources])
        with new_folder(output, overwrite=overwrite) as folder:
            write_tensors(folder / TENSORS, infos, _tensors(modules, others, sources, rule, conflicts))
            (folder / "README.md").write_text(_provenance(sources, rule), encoding="utf-8")
            settings.save_pretrained(str(folder))
        _warn(notes, stacklevel=2)
    return Combined(output, len(modules), sum(m.index.numel() for m in modules), conflicts.report())


def _open(stack: ExitStack, chosen: Sequence[Weighted]) -> list[Source]:
    unique = len({adapter.name for adapter in chosen}) == len(chosen)
    sources = [
        Source(
            adapter.name if unique else adapter.location,
            changes_in_folder(stack.enter_context(AdapterFolder(adapter.location)), None),
            adapter.weight,
        )
        for adapter in chosen
    ]
    for source in sources:
        _check_deltas_only(source)
    return sources


def _check_deltas_only(source: Source) -> None:
    """Check that nothing of an adapter was trained without deltas.

    Raises:
        ActValueError: modules that it saves as a whole, or tokens.
    """
    extra = source.changes.extra
    if extra:
        raise ActValueError(
            f"adapters: {source.name!r} holds {next(iter(extra)).removeprefix(OUTER)}, expected channel deltas only "
            "(modules_to_save and trainable tokens have no deltas to combine: merge the adapters with "
            "model.merge_and_unload() or merge_checkpoint)"
        )


def _warn(notes: Sequence[str], *, stacklevel: int) -> None:
    if notes:
        warnings.warn(
            f"the adapters do not seem to belong to one base: {'; '.join(notes)} (combine adapters of the same base; "
            "on a different one their channels may do nothing or harm)",
            ActWarning,
            stacklevel=stacklevel + 1,
        )


def combined_settings(sources: Sequence[Source]) -> ActConfig:
    """The configuration of the result: that of the first adapter, with the donor only if all adapters agree on it."""
    configs = [source.changes.config for source in sources]
    first = configs[0]
    settings = ActConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        auto_mapping=first.auto_mapping,
        inference_mode=first.inference_mode,
        include_bias=any(config.include_bias for config in configs),
        transfer_scale=1.0,  # the rows of the adapters already contain their transfer scale
    )
    if len({(c.donor, c.donor_revision, c.transfer_scale) for c in configs}) == 1:
        settings.donor, settings.donor_revision = first.donor, first.donor_revision
        settings.transfer_scale = first.transfer_scale
    return settings


def _infos(
    modules: Sequence[UnionModule], others: Mapping[str, OtherTensor]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of the file in their order: wide dtypes first, then by name, as in a file that PEFT saves."""
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in modules:
        infos[f"{OUTER}{module.name}.{PREFIX}index"] = (torch.int64, (module.index.numel(),))
    infos |= {key: (tensor.dtype, tensor.shape) for key, tensor in _wide(others).items()}
    for module in modules:
        for part, shape in sorted(module.shapes().items()):
            infos[f"{OUTER}{module.name}.{PREFIX}{part}"] = (module.dtype, shape)
    return infos | {key: (tensor.dtype, tensor.shape) for key, tensor in others.items() if key not in infos}


def _wide(others: Mapping[str, OtherTensor]) -> dict[str, OtherTensor]:
    """The tensors that are as wide as float64: every tensor begins at a multiple of its item size."""
    return {key: tensor for key, tensor in others.items() if tensor.dtype.itemsize > torch.float32.itemsize}


def _tensors(
    modules: Sequence[UnionModule],
    others: Mapping[str, OtherTensor],
    sources: Sequence[Source],
    rule: Rule,
    conflicts: Conflicts,
) -> Iterator[torch.Tensor]:
    """The tensors in the order of `_infos`, computed one module at a time."""
    yield from (module.index for module in modules)
    yield from (tensor.read() for tensor in _wide(others).values())
    for module in modules:
        deltas = module.combine(sources, rule, conflicts)
        yield from (deltas[part] for part in sorted(deltas))
    yield from (tensor.read() for key, tensor in others.items() if key not in _wide(others))


def _provenance(sources: Sequence[Source], rule: Rule) -> str:
    """The part of the model card that names the combined adapters."""
    density = "" if rule.density is None else f", density {rule.density:g}"
    lines = [
        "---",  # metadata of the card, which huggingface_hub expects
        "library_name: peft",
        "---",
        "",
        "## Combined from",
        "",
        f"Combination type `{rule.combination_type.value}`{density} (`act_peft.combine`).",
        "",
        "| adapter | weight | donor | transfer scale λ |",
        "|---|---|---|---|",
    ]
    for source in sources:
        config = source.changes.config
        lines.append(
            f"| {in_markdown(source.name)} | {source.weight:g} | {in_markdown(config.donor or '')} "
            f"| {config.transfer_scale:g} |"
        )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------- in memory ---


def sources_in_model(model: nn.Module, adapters: Any, weights: Any) -> list[Source]:
    """Adapters of a model with their weights.

    Raises:
        ActTypeError, ActValueError: names or weights that are not right; adapters with more than channel deltas.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise ActTypeError(f"adapters: got {adapters!r:.80}, expected a list with the names of at least one adapter")
    known = getattr(model, "peft_config", {})
    unknown = [name for name in adapters if name not in known]
    if unknown:
        raise ActValueError(f"adapters: got {unknown[0]!r}, expected some of {sorted(known)}")
    factors = checked_weights(adapters, weights)
    sources = []
    for name, weight in zip(adapters, factors, strict=True):
        sources.append(Source(name, changes_in_model(model, name), weight))
        _check_deltas_only(sources[-1])
    return sources


# ---------------------------------------------------------------------------------------------------- conflicts ---


def find_conflicts(
    adapters: Any,
    *,
    model: nn.Module | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
) -> ConflictReport:
    """Find the channels that several ACT adapters change, and the share of their deltas that cancels in the sum.

        cosine    = a·b / (|a|₂ |b|₂)
        cancelled = 1 - |a + b|₁ / (|a|₁ + |b|₁)

    for each pair of adapters, in each module and over all modules. a and b are the weighted deltas of the channels
    that both adapters have, rows and bias elements together.

    Args:
        adapters: folders or Hub ids of ACT adapters, or name -> folder; with `model` the names of its adapters.
        model: a model with these adapters in memory; the adapter scales of `set_scale` count.
        weights: a factor for each adapter, in order or by name; 1 by default.

    Returns:
        The figures of every pair and module. `print(report)` shows a table, `report.to_dict()` is for JSON.

    Raises:
        ActValueError: a missing or damaged adapter, a missing weight, deltas that are not finite.
        ActLoadError: adapters of different models.
        ActTypeError: a weight that is no number.

    Example:
        >>> report = find_conflicts(["math", "code"], weights=[1.0, 0.5])
        >>> report.totals[0].adapters
        ('math', 'code')
        >>> sorted({conflict.module.rpartition(".")[2] for conflict in report.conflicts})
        ['o_proj']
    """
    with ExitStack() as stack:
        if model is None:
            sources = _open(stack, weighted_adapters(adapters, weights))
        else:
            sources = sources_in_model(model, adapters, weights)
        conflicts = Conflicts([source.name for source in sources])
        for module in union_modules(sources):
            conflicts.add_(module.name, module.read(sources))
    return conflicts.report()
