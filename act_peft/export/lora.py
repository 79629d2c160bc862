"""`export_lora`: an ACT adapter as an ordinary LoRA adapter that stock PEFT or a serving engine loads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import nn

from act_peft.adapter.changes import AdapterChanges, changes_in_folder
from act_peft.adapter.file import AdapterFolder
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.folders import check_output
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.export.base import BaseFacts, facts_in_memory, facts_on_disk
from act_peft.export.card import card_text, export_lines
from act_peft.export.folder import write_folder
from act_peft.export.plan import make_plan
from act_peft.export.settings import Biases, ExportSettings, checked_settings
from act_peft.export.targets import Target
from act_peft.layers.changes import changes_in_model
from act_peft.layers.lookup import base_model


@dataclass(frozen=True)
class LoraExport:
    """Result of `export_lora`.

    Attributes:
        folder: the adapter's folder.
        ranks: module name -> rank of its factors.
        errors: module name -> relative error |delta - B A| / |delta| (Frobenius norm); 0 where the factors are exact.
        saved_modules: names of the modules that are saved as a whole.
        error: the relative error of all modules together.
        rank_for_5_percent: the rank with which this would be at most 0.05; None for an export without `max_rank`,
            which is exact.
        size: bytes of all tensors.
    """

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    saved_modules: tuple[str, ...]
    error: float
    rank_for_5_percent: int | None
    size: int


def export_lora(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    target: str | Target = Target.PEFT,
    adapter_name: str = "default",
    max_rank: int | None = None,
    uniform_rank: bool = False,
    biases: str | Biases = Biases.ERROR,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write an ACT adapter as a LoRA adapter that PEFT and serving engines load without act_peft.

        delta W = B A,    A [r, I],    B [O, r],    alpha = r = min(K, I)

    exact, in the dtype of the deltas: with K <= I channels A is the rows and B one-hot, otherwise B has the rows and A
    is the unit matrix. How large the files become is logged (`act_peft.export`) before they are written.

    Args:
        model_or_adapter_dir: a model with an ACT adapter; or the folder or Hub id of an adapter, for which no model is
            built.
        output_dir: the folder to write. It appears whole or not at all.
        target: the program that is to load it. `"peft"`: every module has its own rank (`rank_pattern`); where the
            base is known, the adapter is first loaded into PEFT without data. `"vllm"`, `"sglang"`, `"llama.cpp"`
            (Ollama too): one rank that the engine accepts for all modules, filled up with zeros, alpha = rank, no
            biases, no whole modules; see `act_peft.export.targets`.
        adapter_name: name of the adapter in the model; the factors include the scale of `set_scale`.
        max_rank: a module that needs a higher one gets the best approximation of this rank (from the singular value
            decomposition of its rows). By default all modules are exact.
        uniform_rank: pad the factors with zeros, so that all modules have one rank; always for engines.
        biases: how to treat deltas of biases and norms: `"error"`, `"lora_bias"`, `"modules_to_save"`; see `Biases`.
        base: folder or Hub id of the base's checkpoint, of an adapter on disk. By default the one that the adapter
            names, if it is on this machine; `"modules_to_save"` needs it.
        overwrite: replace an older adapter at `output_dir`.

    Returns:
        Ranks, errors and size.

    Raises:
        ActValueError: a missing or damaged adapter; deltas of biases or norms, unless `biases` says what to do; deltas
            that are not finite; modules that the target cannot load; a rank above what it accepts; settings that
            contradict each other; an output that exists or lies inside the input; no room on the disk. Nothing is
            written then.
        ActLoadError: an adapter's tensors that do not fit its configuration or `base`.
        ActTypeError: neither a model nor a path, a `max_rank` that is not an integer.

    Warns:
        ActWarning: modules that the target loads only for some models; a mixture of experts whose base is not here,
            so that PEFT's renaming of its modules cannot be tried.

    Example:
        >>> export = export_lora("math", "lora")
        >>> export.error
        0.0
        >>> model = PeftModel.from_pretrained(base, "lora")
        >>> served = export_lora("math", "math-vllm", target="vllm", max_rank=64)
    """
    settings = checked_settings(target, max_rank, uniform_rank, biases)
    output = Path(os.path.abspath(output_dir))
    with _opened(model_or_adapter_dir, adapter_name, base, settings) as (source, facts):
        check_output(output, source.inputs, overwrite=overwrite)
        plan = make_plan(source, facts, settings)
        if facts is None and settings.target is Target.PEFT:
            _warn_of_experts(source)
        name = source.config.base_model_name_or_path
        size = write_folder(
            output,
            plan.parts,
            plan.config,
            lambda: card_text(name, export_lines(source, plan, settings.target)),
            overwrite=overwrite,
        )
    measured = plan.measured
    return LoraExport(
        output,
        MappingProxyType(plan.ranks),
        MappingProxyType(measured.errors),
        tuple(plan.whole),
        measured.error,
        None if measured.losses is None else measured.losses.rank_for(0.05),
        size,
    )


def check_lora(
    adapter_dir: str | os.PathLike[str], *, target: str | Target, max_rank: int | None, base: str | os.PathLike[str]
) -> None:
    """Check that `export_lora` can export an adapter; its values are not read.

    Raises:
        ActValueError, ActTypeError: it cannot, as `export_lora`.
    """
    settings = checked_settings(target, max_rank, False, Biases.ERROR)
    with _opened(adapter_dir, "default", base, settings) as (source, facts):
        make_plan(source, facts, settings)


@contextmanager
def _opened(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    adapter_name: str,
    base: str | os.PathLike[str] | None,
    settings: ExportSettings,
) -> Iterator[tuple[AdapterChanges, BaseFacts | None]]:
    """The changes of the adapter, and what is known of its base."""
    if isinstance(model_or_adapter_dir, nn.Module):
        if base is not None:
            raise ActValueError(
                "base: got one together with a model in memory, which has the base's weights (leave it out)"
            )
        changes = changes_in_model(model_or_adapter_dir, adapter_name)
        yield changes, facts_in_memory(base_model(model_or_adapter_dir), with_skeleton=settings.target is Target.PEFT)
        return
    if not isinstance(model_or_adapter_dir, (str, os.PathLike)):
        raise ActTypeError(
            f"export_lora: got {type(model_or_adapter_dir).__name__}, expected a model with an ACT adapter, or "
            "the folder or Hub id of one"
        )
    with AdapterFolder(model_or_adapter_dir) as folder:
        if adapter_name != "default":
            raise ActValueError(
                f"adapter_name: got {adapter_name!r} with a folder, which holds only one adapter (leave it out; "
                f"PEFT saves an adapter with a name in a folder of this name: {folder.location}/{adapter_name})"
            )
        if settings.biases is not Biases.MODULES_TO_SAVE:
            source = changes_in_folder(folder, None)
            recorded = source.config.base_model_name_or_path
            location = recorded if base is None else base
            yield source, facts_on_disk(location, folder.modules, must_exist=base is not None) if location else None
            return
        if base is None:
            raise ActValueError(
                "base: needed for biases='modules_to_save' of an adapter on disk, got none (pass the folder or Hub id "
                "of the base's checkpoint)"
            )
        with Checkpoint.open(base) as checkpoint:
            source = changes_in_folder(folder, checkpoint)
            yield source, facts_on_disk(checkpoint.folder, folder.modules, must_exist=False)


def _warn_of_experts(source: AdapterChanges) -> None:
    """PEFT renames modules of some mixtures of experts; without the base's configuration this cannot be tried."""
    if any("expert" in module.name for module in source.modules):
        warnings.warn(
            f"{source.origin}: the base is a mixture of experts and not on this machine, so it was not tried whether "
            "PEFT loads the factors of its dense and shared layers (pass base=...)",
            ActWarning,
            stacklevel=3,
        )
