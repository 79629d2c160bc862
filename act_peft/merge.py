"""Merge ACT adapters into a full checkpoint on disk, at about the cost of copying it.

Every file of the base is mapped and written once, from beginning to end, with changed rows between the unchanged ones.
No model is built, and only some megabytes are in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from act_peft.adapter.file import AdapterFolder
from act_peft.combination.weighting import weighted_adapters
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import INDEX, Checkpoint, read_json, small_files
from act_peft.disk.folders import check_output, check_room, file_in
from act_peft.errors import ActWarning
from act_peft.merging.plan import Plan, Source
from act_peft.merging.planning import compare_base, make_plan
from act_peft.merging.writing import writing_jobs

_WORKERS = 2  # parts at a time; more would only wait for the same disk
_SLACK = 1 << 20  # bytes that stay free on the disk


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    safe_merge: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Merge ACT adapters into a checkpoint on disk, and write a full checkpoint that plain transformers loads.

        W[i, :] = round(W_base[i, :] + sum over adapters of weight * delta[i, :])          for their channels i

    The result equals, bit for bit, `merge_and_unload` of a model in the checkpoint's dtype with these adapters (and
    `set_scale(name, weight)`). The sum is computed in float32, in the sorted order of the adapters' names: the keys of
    `adapters`, or the last parts of their paths. Files without a change are copied byte for byte, and so are
    configuration, tokenizer, chat template, code and licence. The README, which describes the base, and pickled files
    are not copied. If the base ties its embeddings and one of them changes, the result has both tensors and
    `tie_word_embeddings: false`.

    What the adapters hold beside deltas is written too: modules that were trained as a whole (`modules_to_save`), rows
    of tokens (`trainable_token_indices`), and embeddings of a base with a resized vocabulary, whose number of tokens
    the configuration gets. Weights do not count for these.

    Args:
        base: folder or Hub id of the base's checkpoint, in safetensors.
        adapters: folders or Hub ids of ACT adapters: one, several, or name -> folder.
        output_dir: the folder to write. It appears whole or not at all.
        weights: a factor for each adapter, in the order of `adapters` or by name; 1 by default.
        safe_merge: refuse a result with values that are not finite, as in memory. Without it that is a warning.
        overwrite: replace an older checkpoint at `output_dir`.
        show_progress: show a progress bar over parts of files, if the error stream is a terminal.

    Raises:
        ActValueError: a missing or damaged checkpoint or adapter; deltas that are not finite, times their weight
            included; no weight for an adapter; a quantized tensor that would change; no room on the disk; an output
            that exists or lies inside an input; with `safe_merge` a merged value that is not finite. Nothing is
            written then.
        ActLoadError: an adapter that does not fit the base; adapters that bring different whole tensors.
        ActTypeError: a weight that is not a number.

    Warns:
        ActWarning: once for each adapter that was made for a base with different weights; for a weight other than 1
            where an adapter holds more than deltas; once if merged values are not finite, as float16 overflows.

    Example:
        >>> merge_checkpoint(BASE, ["math", "code"], "merged", weights=[1.0, 0.5])
    """
    output = Path(os.path.abspath(output_dir))
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(base))
        sources = [
            Source(stack.enter_context(AdapterFolder(one.location)), one.weight)
            for one in sorted(weighted_adapters(adapters, weights), key=lambda one: one.name)
        ]
        check_output(output, [checkpoint.folder, *(s.adapter.folder for s in sources)], overwrite=overwrite)
        plan = make_plan(checkpoint, sources)
        small = small_files(checkpoint.folder)
        needed = sum(checkpoint.shard(file).size for file in checkpoint.files)
        needed += sum(file_in(checkpoint.folder, name).stat().st_size for name in small)
        needed += sum(info.stop - info.start for info in plan.new_sizes().values())
        check_room(output, needed + _SLACK)
        with new_folder(output, overwrite=overwrite) as folder:
            for name in small:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file_in(checkpoint.folder, name), folder / name)
            if plan.config:
                (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
            _write_index(checkpoint, plan, folder)
            with ThreadPoolExecutor(_WORKERS) as pool:
                jobs = list(writing_jobs(plan, folder, safe_merge=safe_merge))
                written = pool.map(lambda job: job(), jobs)
                hidden = None if show_progress else True
                for _ in tqdm(written, desc="merge", total=len(jobs), unit="part", disable=hidden):
                    pass  # an error ends the loop and cancels the jobs that have not started
            for note in _notes(checkpoint, sources, plan):
                warnings.warn(note, ActWarning, stacklevel=2)


def _notes(checkpoint: Checkpoint, sources: Sequence[Source], plan: Plan) -> Iterator[str]:
    """What the user should know about a merge that is done."""
    for source in sources:
        note = compare_base(checkpoint, source, plan)
        if note is not None:
            yield note
        trained = source.adapter.byproducts.trained
        if trained and source.weight != 1:
            yield (
                f"{source.adapter.location}: its weight {source.weight:g} does not count for {trained[0]}, which is "
                f"no delta and is taken over as it is ({len(trained)} such modules or tensors; as in memory)"
            )
    if plan.overflows:
        yield (
            f"{next(iter(plan.overflows))}: merged values are not finite: the sums are too large for the "
            f"checkpoint's dtype, or its own values are not finite ({len(plan.overflows)} modules; use smaller "
            "weights or a checkpoint in a wider dtype; safe_merge=True refuses such a result)"
        )


def _write_index(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Name the new tensors and sizes in the index, if there is one."""
    sizes = plan.new_sizes()
    if not sizes or not (folder / INDEX).is_file():
        return
    index = read_json(checkpoint.folder, INDEX)
    metadata = index.get("metadata")
    for key, info in sizes.items():
        index["weight_map"][key] = plan.file_of(key)
        old = checkpoint.info(key) if key in checkpoint else None
        grown = info.stop - info.start - (0 if old is None else old.stop - old.start)
        elements = math.prod(info.shape) - (0 if old is None else math.prod(old.shape))
        for name, more in (("total_size", grown), ("total_parameters", elements)):
            if isinstance(metadata, dict) and isinstance(metadata.get(name), int):
                metadata[name] += more
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
