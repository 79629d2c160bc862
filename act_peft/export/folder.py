"""Writing an adapter's folder part by part, so that the tensors of only one module are in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from act_peft.disk.atomic import new_folder
from act_peft.disk.folders import check_room
from act_peft.disk.writing import TensorInfos, size_of, write_tensors

logger = logging.getLogger("act_peft.export")

_SLACK = 1 << 20  # bytes kept free for configuration and card


@dataclass(frozen=True)
class Part:
    """Tensors that are made together.

    Attributes:
        infos: key -> dtype and shape.
        make: returns the tensors in this order; called once.
    """

    infos: TensorInfos
    make: Callable[[], Sequence[torch.Tensor]]


def tensor_part(key: str, tensor: torch.Tensor) -> Part:
    """A part of one tensor that exists already."""
    return Part({key: (tensor.dtype, tuple(tensor.shape))}, lambda: [tensor])


def infos_of(parts: Iterable[Part]) -> TensorInfos:
    """Key -> dtype and shape of all parts."""
    return {key: info for part in parts for key, info in part.infos.items()}


def write_folder(
    output: Path,
    parts: Iterable[Part],
    config: PeftConfig,
    card: Callable[[], str] | None = None,
    *,
    overwrite: bool,
) -> int:
    """Write an adapter's folder, whole or not at all; how large it becomes is logged before.

    Args:
        output: the folder.
        parts: its tensors.
        config: PEFT's configuration.
        card: returns the text of its README, asked for after the last tensor; None where `config` writes one.
        overwrite: whether an older adapter is replaced.

    Returns:
        Bytes of all tensors.

    Raises:
        ActValueError: no room on the disk, or it refuses a write.
    """
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(parts, key=lambda part: -min(dtype.itemsize for dtype, _ in part.infos.values()))
    infos = infos_of(ordered)
    size = size_of(infos)
    check_room(output, size + _SLACK)
    logger.info("%s: writing %.1f MB", output, size / 1e6)
    with new_folder(output, overwrite=overwrite) as beside:
        write_tensors(beside / SAFETENSORS_WEIGHTS_NAME, infos, (one for part in ordered for one in part.make()))
        if card is not None:
            ModelCard(card()).save(beside / "README.md")
        config.save_pretrained(str(beside))
    return size
