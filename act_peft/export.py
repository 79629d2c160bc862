"""Export: an ACT adapter as an ordinary LoRA adapter that stock PEFT loads.

A delta of K rows is already a product of two factors:

    delta W = B A,    A [K, I]: the rows,    B [O, K]: one-hot, B[index[k], k] = 1

The folder is written tensor by tensor, so the factors of only one module are in memory at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from torch import nn

from act_peft.adapter.changes import AdapterChanges, ModuleChange, OtherTensor, changes_in_folder
from act_peft.adapter.file import TENSORS, AdapterFolder
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import wide_dtype
from act_peft.checks import member_of, whole_number
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.folders import check_output, check_room
from act_peft.disk.writing import size_of, write_tensors
from act_peft.doors import OUTER
from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers.changes import changes_in_model

_NAMED = 8  # modules that a message lists by name
_SLACK = 1 << 20  # bytes kept free for configuration and card


class Biases(Enum):
    """How to treat deltas of biases and norms, for which a LoRA adapter has no factors.

    ERROR: refuse them. LORA_BIAS: PEFT's `lora_bias`; exact; only for linear layers, in an adapter without embeddings.
    MODULES_TO_SAVE: save these modules as a whole, base weights included. Deltas that are all zero are ignored.
    """

    ERROR = "error"
    LORA_BIAS = "lora_bias"
    MODULES_TO_SAVE = "modules_to_save"


@dataclass(frozen=True)
class LoraExport:
    """Result of `export_lora`.

    Attributes:
        folder: the adapter's folder.
        ranks: module name -> rank of its factors.
        errors: module name -> relative error |delta - B A| / |delta| (Frobenius norm); 0 where the factors are exact.
        saved_modules: names of the modules that are saved as a whole.
    """

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    saved_modules: tuple[str, ...]


def export_lora(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    max_rank: int | None = None,
    uniform_rank: bool = False,
    biases: str | Biases = Biases.ERROR,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write an ACT adapter as a LoRA adapter that PEFT loads without act_peft.

        delta W = B A,    A [K, I]: the rows,    B [O, K]: one-hot,    alpha = rank = K

    exact, in the dtype of the deltas. PEFT reads the ranks of the modules from `rank_pattern`; `r` is the largest
    one. Programs that know only one rank (llama.cpp, PEFT's hotswapping) need `uniform_rank`.

    Args:
        model_or_adapter_dir: a model with an ACT adapter; or the folder or Hub id of an adapter, for which no model is
            built.
        output_dir: the folder to write. It appears whole or not at all.
        adapter_name: name of the adapter in the model; the factors include the scale of `set_scale`.
        max_rank: a module with more channels gets the best approximation of this rank (from the singular value
            decomposition of its rows). By default all modules are exact.
        uniform_rank: pad the factors with zeros, so that all modules have one rank.
        biases: how to treat deltas of biases and norms: `"error"`, `"lora_bias"`, `"modules_to_save"`; see `Biases`.
        base: folder or Hub id of the base's checkpoint; only for `"modules_to_save"` of an adapter on disk.
        overwrite: replace an older adapter at `output_dir`.

    Returns:
        Ranks and errors per module.

    Raises:
        ActValueError: a missing or damaged adapter; deltas of biases or norms, unless `biases` says what to do; deltas
            that are not finite; settings that contradict each other; an output that exists or lies inside the input;
            no room on the disk. Nothing is written then.
        ActLoadError: an adapter's tensors that do not fit its configuration or `base`.
        ActTypeError: neither a model nor a path, a `max_rank` that is not an integer.

    Example:
        >>> export = export_lora("math", "lora")
        >>> max(export.errors.values())
        0.0
        >>> model = PeftModel.from_pretrained(base, "lora")
    """
    choice = member_of(Biases, biases, "biases")
    if max_rank is not None:
        max_rank = whole_number(max_rank, "max_rank", least=1)
    output = Path(os.path.abspath(output_dir))
    with ExitStack() as stack:
        if isinstance(model_or_adapter_dir, nn.Module):
            if base is not None:
                raise ActValueError(
                    "base: got one together with a model in memory, which has the base's weights (leave it out)"
                )
            source = changes_in_model(model_or_adapter_dir, adapter_name)
        elif isinstance(model_or_adapter_dir, (str, os.PathLike)):
            folder = stack.enter_context(AdapterFolder(model_or_adapter_dir))
            if adapter_name != "default":
                raise ActValueError(
                    f"adapter_name: got {adapter_name!r} with a folder, which holds only one adapter (leave it out; "
                    f"PEFT saves an adapter with a name in a folder of this name: {folder.location}/{adapter_name})"
                )
            if (base is None) == (choice is Biases.MODULES_TO_SAVE):
                raise ActValueError(
                    "base: needed for biases='modules_to_save' of an adapter on disk, and only there; "
                    f"got base={base!r} with biases={choice.value!r}"
                )
            checkpoint = None if base is None else stack.enter_context(Checkpoint.open(base))
            source = changes_in_folder(folder, checkpoint)
        else:
            raise ActTypeError(
                f"export_lora: got {type(model_or_adapter_dir).__name__}, expected a model with an ACT adapter, or "
                "the folder or Hub id of one"
            )
        check_output(output, source.inputs, overwrite=overwrite)
        plan = _make_plan(source, choice, max_rank=max_rank, uniform_rank=uniform_rank)
        check_room(output, size_of(_infos(plan.parts)) + _SLACK)
        with new_folder(output) as beside:
            errors = _write_tensors(beside / TENSORS, plan.parts)
            plan.config.save_pretrained(str(beside))
            _write_card(beside, source, plan, errors)
    return LoraExport(output, MappingProxyType(plan.ranks), MappingProxyType(errors), tuple(plan.saved))


# ------------------------------------------------------------------------------------------------------- planning ---


@dataclass(frozen=True)
class _Part:
    """Tensors that are made together: key -> dtype and shape. `make` returns them in this order, and their error."""

    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], tuple[list[torch.Tensor], float]]
    module: str | None = None


@dataclass(frozen=True)
class _Plan:
    config: LoraConfig
    ranks: dict[str, int]
    saved: list[str]
    parts: list[_Part]


def _make_plan(source: AdapterChanges, choice: Biases, *, max_rank: int | None, uniform_rank: bool) -> _Plan:
    """Decide how each module is saved; only biases and norms are read."""
    modules = sorted(source.modules, key=lambda m: m.name)
    norms = [m for m in modules if m.kind.is_norm and (m.bias is not None or bool(m.rows().any()))]
    biased = [m for m in modules if not m.kind.is_norm and m.bias is not None]
    if choice is Biases.ERROR and (norms or biased):
        raise ActValueError(
            f"{_listed([*biased, *norms])}: deltas of biases and norms have no LoRA form, expected weights only "
            "(merge the adapter with merge_checkpoint or merge_and_unload; or pass biases='modules_to_save' to save "
            "these modules as a whole, or, where they are linear layers, biases='lora_bias')"
        )
    whole = [*biased, *norms] if choice is Biases.MODULES_TO_SAVE else []
    saved = sorted(m.name for m in whole)
    factored = [m for m in modules if not m.kind.is_norm and m.name not in saved]
    if not factored:
        raise ActValueError(
            f"{source.origin}: no module is left for LoRA, expected at least one linear layer or embedding (merge the "
            "adapter with merge_checkpoint or merge_and_unload)"
        )
    lora_bias = choice is Biases.LORA_BIAS and bool(biased)
    unfit = [*norms, *(m for m in factored if lora_bias and m.kind is ChannelKind.EMBEDDING)]
    if choice is Biases.LORA_BIAS and unfit:
        raise ActValueError(
            f"{_listed(unfit)}: biases='lora_bias' is only for linear layers, in an adapter without embeddings "
            "(merge the adapter with merge_checkpoint, or pass biases='modules_to_save')"
        )
    ranks = {m.name: factor_rank(m.index.numel(), m.width, max_rank) for m in factored}
    top = max(ranks.values())
    if uniform_rank:
        ranks = dict.fromkeys(ranks, top)
    parts = [_factor_part(m, ranks[m.name], max_rank, lora_bias) for m in factored]
    parts += [_whole_part(m, part, info) for m in whole for part, info in m.whole_infos().items()]
    parts += [_other_part(key, tensor) for key, tensor in source.extra.items()]
    tokens = {key.removeprefix(OUTER).partition(".token_adapter.")[0] for key in source.extra}
    for name, tensor in source.of_base.items():
        module, _, part = name.rpartition(".")
        if module not in saved:
            inside = ".token_adapter.base_layer" if module in tokens else ".base_layer" if module in ranks else ""
            parts.append(_other_part(f"{OUTER}{module}{inside}.{part}", tensor))
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    parts.sort(key=lambda part: -min(dtype.itemsize for dtype, _ in part.infos.values()))
    return _Plan(_lora_config(source, factored, saved, ranks, lora_bias), ranks, saved, parts)


def _listed(modules: Sequence[ModuleChange]) -> str:
    more = len(modules) - _NAMED
    return ", ".join(m.name for m in modules[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _lora_config(
    source: AdapterChanges,
    factored: Sequence[ModuleChange],
    whole: Sequence[str],
    ranks: Mapping[str, int],
    lora_bias: bool,
) -> LoraConfig:
    targets = [m.name for m in factored]
    # To PEFT an entry of `modules_to_save` is the end of a name ...
    for name in whole:
        also_meant = [other for other in source.known if other != name and other.endswith(name)]
        if also_meant:
            raise ActValueError(
                f"{name}: cannot be saved as a whole, because PEFT would save {also_meant[0]} too (merge the "
                "adapter with merge_checkpoint or merge_and_unload)"
            )
    # ... and an entry of `target_modules` is a name or its dotted end.
    excluded = [n for n in source.known if n not in targets and any(n.endswith(f".{t}") for t in targets)]
    top = max(ranks.values())
    # PEFT matches a pattern with the end of a name unless it begins with "^".
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != top}
    config = LoraConfig(
        task_type=source.config.task_type,
        base_model_name_or_path=source.config.base_model_name_or_path,
        revision=source.config.revision,
        auto_mapping=source.config.auto_mapping,
        inference_mode=True,
        r=top,
        lora_alpha=top,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets,
        exclude_modules="|".join(map(re.escape, excluded)) or None,
        lora_dropout=0.0,
        bias="none",
        lora_bias=lora_bias,
        fan_in_fan_out=any(m.kind is ChannelKind.CONV1D for m in factored),
        modules_to_save=[*(source.config.modules_to_save or []), *whole] or None,
        trainable_token_indices=source.config.trainable_token_indices,
    )
    config.target_modules = sorted(targets)  # LoraConfig makes a set, whose order changes from run to run
    return config


def _factor_part(module: ModuleChange, rank: int, max_rank: int | None, lora_bias: bool) -> _Part:
    a, b = f"{OUTER}{module.name}.lora_A.weight", f"{OUTER}{module.name}.lora_B.weight"
    if module.kind is ChannelKind.EMBEDDING:
        a, b = f"{OUTER}{module.name}.lora_embedding_A", f"{OUTER}{module.name}.lora_embedding_B"
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    infos = {a: (module.dtype, (rank, module.width)), b: (module.dtype, (module.num_channels, rank))}
    if lora_bias:
        infos[f"{OUTER}{module.name}.lora_B.bias"] = (module.dtype, (module.num_channels,))

    def make() -> tuple[list[torch.Tensor], float]:
        rows = _finite(module, module.rows())  # [K, I]
        left, right, error = factors(rows, max_rank)
        lora_a = rows.new_zeros(rank, module.width)
        lora_a[: right.shape[0]] = right
        lora_b = rows.new_zeros(module.num_channels, rank)
        lora_b[module.index, : left.shape[1]] = left
        made = [lora_a, lora_b]
        if lora_bias:
            bias = rows.new_zeros(module.num_channels)
            if module.bias is not None:
                bias[module.index] = _finite(module, module.bias).to(bias)
            made.append(bias)
        return made, error

    return _Part(infos, make, module.name)


def _other_part(key: str, tensor: OtherTensor) -> _Part:
    return _Part({key: (tensor.dtype, tensor.shape)}, lambda: ([tensor.read()], 0.0))


def _whole_part(module: ModuleChange, part: str, info: tuple[torch.dtype, tuple[int, ...]]) -> _Part:
    return _Part({f"{OUTER}{module.name}.{part}": info}, lambda: ([_finite(module, module.whole(part))], 0.0))


def _finite(module: ModuleChange, tensor: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise ActValueError(
            f"{module.name}: the deltas hold NaN or infinity, expected finite numbers (the adapter is broken)"
        )
    return tensor


# -------------------------------------------------------------------------------------------------------- writing ---


def _write_tensors(path: Path, parts: Sequence[_Part]) -> dict[str, float]:
    """Write a safetensors file part by part; returns module name -> error of its factors."""
    errors = {}

    def tensors() -> Iterator[torch.Tensor]:
        for part in parts:
            made, error = part.make()
            if part.module is not None:
                errors[part.module] = error
            yield from made

    write_tensors(path, _infos(parts), tensors())
    return errors


def _infos(parts: Sequence[_Part]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: info for part in parts for key, info in part.infos.items()}


def _write_card(folder: Path, source: AdapterChanges, plan: _Plan, errors: Mapping[str, float]) -> None:
    config = source.config
    base = config.base_model_name_or_path
    data = ModelCardData(base_model=base or None, library_name="peft", tags=["lora", "peft", "act"])
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_card_lines(source, plan, errors)) + "\n")
    card.save(folder / "README.md")


def _card_lines(source: AdapterChanges, plan: _Plan, errors: Mapping[str, float]) -> Iterator[str]:
    config = source.config
    yield "## LoRA adapter made from an ACT adapter\n"
    yield f"Made from {source.origin} ([ACT](https://arxiv.org/abs/2601.09398)) with `act_peft.export_lora`."
    yield "PEFT loads it as any LoRA adapter; act_peft is not needed.\n"
    yield f"- base: {config.base_model_name_or_path or 'unknown'}"
    yield f"- donor of the ACT adapter: {config.donor or 'none, or one in memory'}"
    yield f"- modules with LoRA factors: {len(plan.ranks)}, rank {min(plan.ranks.values())} to {plan.config.r}"
    inexact = {name: error for name, error in errors.items() if error}
    if inexact:
        worst = max(inexact, key=lambda name: inexact[name])
        yield (
            f"- approximated modules: {len(inexact)}; the greatest relative error is {inexact[worst]:.3g}, in {worst}"
        )
    else:
        yield "- the factors are exact"
    if plan.saved:
        yield f"- saved as a whole, base weights included: {', '.join(plan.saved)}"
    yield "\n| module | rank | relative error |\n|---|---|---|"
    for name, rank in plan.ranks.items():
        yield f"| {name} | {rank} | {errors[name]:.3g} |"


def factors(rows: torch.Tensor, max_rank: int | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two factors of a delta's rows: exact, or the best ones of rank `max_rank` if there are more rows.

    Args:
        rows: `[K, I]`, finite.
        max_rank: from 1 on, or None.

    Returns:
        `left` `[K, r]` and `right` `[r, I]` in the dtype of `rows`, and |rows - left right| / |rows| in the Frobenius
        norm, computed from the singular values that are left out.
    """
    count, width = rows.shape
    if max_rank is None or count <= max_rank:
        return torch.eye(count, dtype=rows.dtype), rows, 0.0
    if width <= max_rank:
        return rows, torch.eye(width, dtype=rows.dtype), 0.0
    u, s, vh = torch.linalg.svd(rows.to(wide_dtype(rows.dtype)), full_matrices=False)
    squares = s.double().square()
    total = float(squares.sum())
    error = (float(squares[max_rank:].sum()) / total) ** 0.5 if total else 0.0
    right = s[:max_rank, None] * vh[:max_rank]
    return u[:, :max_rank].to(rows.dtype), right.to(rows.dtype), error


def factor_rank(count: int, width: int, max_rank: int | None) -> int:
    """Rank of the factors that `factors` returns."""
    return count if max_rank is None or count <= max_rank else min(max_rank, width)
