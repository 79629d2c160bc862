"""ACT adapters made of a fitted transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from act_peft.adapter.base_record import fingerprint, module_record
from act_peft.adapter.config import ActConfig
from act_peft.adapter.models import record_of
from act_peft.channels.rows import wide_dtype
from act_peft.disk.folders import check_output
from act_peft.disk.parameters import Parameters
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.export.folder import tensor_part, write_folder
from act_peft.fitting.adapter_parts import Tensors, token_indices, token_tensors
from act_peft.fitting.module import FitRecord, FittedModule, Modules
from act_peft.layers.deltas import PREFIX


def write_act(
    output: Path,
    modules: Modules,
    record: FitRecord,
    *,
    channels: Mapping[str, torch.Tensor],
    tokens: Mapping[str, torch.Tensor],
    base: Parameters | None,
    total: int,
    include_bias: bool,
    overwrite: bool,
) -> None:
    """Write an ACT adapter; arguments as `FittedTransfer.to_adapter`.

    Args:
        output: the folder.
        modules: the fitted modules.
        record: what they were made from.
        channels: module name -> channels.
        tokens: name of an embedding -> tokens.
        base: the base's weights, None where they cannot be reached; needed for tokens.
        total: number of all channels that could have been selected.
        include_bias: as in `ActConfig`.
        overwrite: whether an older adapter is replaced.
    """
    check_output(output, [], overwrite=overwrite)
    if not channels:
        raise ActValueError("mask: selects no channel, expected at least one (PEFT loads no ACT adapter without)")
    tensors: Tensors = {}
    records = {}
    samples = {} if base is None else record_of(base, channels).fingerprints
    for name, index in channels.items():
        module = modules[name] if include_bias else replace(modules[name], bias=None)
        parts = {"index": index, "weight": _in_file_dtype(module.weight_change(index))}
        if module.bias is not None:
            parts["bias"] = _in_file_dtype(module.bias[index])
        tensors |= {f"{OUTER}{name}.{PREFIX}{part}": tensor for part, tensor in parts.items()}
        found = None if base is None else _base_fingerprint(base, name, module, index)
        records[name] = module_record(
            module.kind, selected=index.numel(), channels=len(module.delta), base=found, sample=samples.get(name)
        )
    tensors |= token_tensors(modules, tokens, base)
    config = ActConfig(
        donor=record.donors[0] if len(record.donors) == 1 else None,
        transfer_scale=1.0,
        include_bias=include_bias,
        task_type=record.task_type,
        inference_mode=True,
        base_model_name_or_path=record.base,
        trainable_token_indices=token_indices(tokens),
    )
    config.adapted_modules = records
    config.density = sum(index.numel() for index in channels.values()) / total
    write_folder(output, [tensor_part(key, tensors[key]) for key in sorted(tensors)], config, overwrite=overwrite)


def _base_fingerprint(base: Parameters, name: str, module: FittedModule, index: torch.Tensor) -> str:
    dim = module.kind.channel_dim
    weight = base.rows(f"{name}.weight", index, dim)
    bias = base.rows(f"{name}.bias", index, 0) if module.bias is not None else None
    return fingerprint(weight, bias)


def _in_file_dtype(change: torch.Tensor) -> torch.Tensor:
    return change.to(wide_dtype(change.dtype)).contiguous()
