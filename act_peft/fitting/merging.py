"""A fitted transfer merged into a checkpoint on disk, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from act_peft.channels.rows import wide_dtype
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import Checkpoint, small_files
from act_peft.disk.folders import check_output, check_room, copy_file, file_in
from act_peft.disk.parameters import Parameters
from act_peft.disk.writing import write_tensors
from act_peft.fitting.module import Modules

_SLACK = 1 << 20


def merge_fitted(
    checkpoint: Checkpoint, parameters: Parameters, modules: Modules, output: Path, *, overwrite: bool
) -> None:
    """Write the checkpoint with the fitted changes added; arguments and errors as `FittedTransfer.merge`.

    Args:
        checkpoint: the base's.
        parameters: the same by the names of the fitted modules.
        modules: the fitted modules.
        output: the folder to write.
        overwrite: whether an older checkpoint is replaced.
    """
    changes = _changes(parameters, modules)
    check_output(output, [checkpoint.folder], overwrite=overwrite)
    small = small_files(checkpoint.folder)
    needed = sum(checkpoint.shard(file).size for file in checkpoint.files)
    needed += sum(file_in(checkpoint.folder, name).stat().st_size for name in small)
    check_room(output, needed + _SLACK)
    with new_folder(output, overwrite=overwrite) as folder:
        for name in small:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file_in(checkpoint.folder, name), folder / name)
        for file in checkpoint.files:
            _write_file(checkpoint, file, changes, folder / file)


def _changes(parameters: Parameters, modules: Modules) -> dict[str, torch.Tensor]:
    """Key in the checkpoint -> what is added to its tensor; a tied weight may lie there under several keys."""
    changes: dict[str, torch.Tensor] = {}
    for module in modules.values():
        for name in module.names:
            for part, change in (("weight", module.weight_change()), ("bias", module.bias)):
                if change is not None and f"{name}.{part}" in parameters:
                    changes[parameters.key(f"{name}.{part}")] = change
    return changes


def _write_file(checkpoint: Checkpoint, file: str, changes: Mapping[str, torch.Tensor], target: Path) -> None:
    shard = checkpoint.shard(file)
    keys = [key for key in checkpoint.names if checkpoint.file_of(key) == file]
    if not set(keys) & set(changes):
        copy_file(shard.path, target)
        return
    # Wide dtypes first, so that every tensor begins at a multiple of its own size.
    keys.sort(key=lambda key: (-checkpoint.dtype(key).itemsize, shard.info(key).start))
    infos = {key: (checkpoint.dtype(key), checkpoint.shape(key)) for key in keys}

    def tensors() -> Iterator[torch.Tensor]:
        for key in keys:
            tensor = checkpoint.tensor(key)
            if key in changes:
                wide = wide_dtype(tensor.dtype)
                tensor = (tensor.to(wide) + changes[key].to(wide)).to(tensor.dtype)
            yield tensor

    write_tensors(target, infos, tensors())
