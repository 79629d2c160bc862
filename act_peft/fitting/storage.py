"""The file of a fitted transfer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.origin import Origin
from act_peft.checks import MOST
from act_peft.disk import tensorfile
from act_peft.disk.shard import PLAIN
from act_peft.errors import ActError, ActValueError
from act_peft.fitting.module import FitRecord, FittedModule, Modules
from act_peft.fitting.settings import FitSettings

KIND = "fitted transfer"
_PLAIN_VERSION, _VERSION = 1, 2  # version 2 has the origins
_PARTS = ("delta", "bias", "gains", "directions", "strengths", "token_metric", "token_weights")
_OPTIONAL = ("bias", "directions", "strengths", "token_metric", "token_weights")
_DOUBLE = ("gains", "strengths", "token_metric", "token_weights")


def write(path: str | os.PathLike[str], modules: Modules, record: FitRecord) -> None:
    """Write a fitted transfer to one safetensors file, whole or not at all.

    Layout: tensors `MODULE:PART` with the parts of `FittedModule` that a module has, and in the metadata `modules:
    [{name, names, head, kind, fingerprint}, ...]` in the base's order, `settings`, `num_tokens`, `base`, `donors` and
    `task_type`. Version 2 adds `origins: [{base, donor}, ...]` for each donor, as in the file of a mask.

    Raises:
        ActValueError: `path` is a folder or lies in a folder that does not exist.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        parts = {part: getattr(module, part) for part in _PARTS}
        tensors |= {f"{name}:{part}": tensor for part, tensor in parts.items() if tensor is not None}
    metadata: dict[str, Any] = {
        "modules": [
            {"name": name, "names": list(m.names), "head": m.head, "kind": m.kind.value, "fingerprint": m.fingerprint}
            for name, m in modules.items()
        ],
        "settings": dataclasses.asdict(record.settings),
        "num_tokens": list(record.num_tokens),
        "base": record.base,
        "donors": list(record.donors),
        "task_type": record.task_type,
    }
    if record.origins:
        metadata |= {"origins": [origin.to_json() for origin in record.origins]}
    version = _VERSION if record.origins else _PLAIN_VERSION
    tensorfile.write_large(path, KIND, version, tensors, metadata)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, FittedModule], FitRecord]:
    """Read a file that `write` wrote.

    Raises:
        ActValueError: the file is missing, damaged, of another kind or of a newer version.
    """
    tensors, metadata = tensorfile.read(path, KIND, _VERSION)
    try:
        record = _record(metadata)
        modules = {str(entry["name"]): _module(entry, tensors) for entry in metadata["modules"]}
    except ActError as error:
        raise ActValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ActValueError(
            f"{path}: its metadata is not that of a fitted transfer ({str(error)[:200]}), expected what save wrote "
            "(save it again)"
        ) from error
    if tensors:
        raise ActValueError(
            f"{path}: got the tensor {next(iter(tensors))!r}, expected those of the modules that the metadata lists "
            "(save it again)"
        )
    return modules, record


def _record(metadata: Mapping[str, Any]) -> FitRecord:
    names = [metadata["base"], metadata["task_type"], *metadata["donors"]]
    if not all(name is None or isinstance(name, str) for name in names):
        raise ValueError("base, donors and task_type are names")
    counts = tuple(metadata["num_tokens"])
    if (
        not all(type(count) is int and 0 <= count <= MOST for count in counts)
        or len(counts) != len(metadata["donors"]) + 1
    ):
        raise ValueError(f"num_tokens: {counts!r:.100}")
    return FitRecord(
        settings=FitSettings(**metadata["settings"]),
        num_tokens=counts,
        base=metadata["base"],
        donors=tuple(metadata["donors"]),
        task_type=metadata["task_type"],
        origins=tuple(Origin.from_json(origin) for origin in metadata.get("origins", ())),
    )


def _module(entry: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> FittedModule:
    """Take the tensors of a module out of those that were read."""
    name, names, kind = entry["name"], tuple(entry["names"]), ChannelKind(entry["kind"])
    head = entry["head"]
    if (
        not names
        or name != names[0]
        or head not in (None, *names[1:])
        or not all(isinstance(one, str) for one in (*names, entry["fingerprint"]))
    ):
        raise ValueError(f"{name!r:.100}: names and fingerprint")
    parts = {part: tensors.pop(f"{name}:{part}", None) for part in _PARTS}
    missing = [part for part, tensor in parts.items() if tensor is None and part not in _OPTIONAL]
    if missing:
        raise ActValueError(f"{name}: got no tensor {missing[0]!r}, expected one (save it again)")
    module = FittedModule(names=names, head=head, kind=kind, fingerprint=entry["fingerprint"], **parts)  # type: ignore[arg-type]
    _check_shapes(name, module)
    return module


def _check_shapes(name: str, module: FittedModule) -> None:
    delta = module.delta
    rows, width = delta.shape if delta.dim() == 2 else (0, 0)
    wide = width + (module.bias is not None)
    rank = 0 if module.directions is None or module.directions.dim() != 2 else module.directions.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "delta": (rows, 1 if module.kind.is_norm else width),
        "bias": (rows,),
        "gains": (rows,),
        "directions": (rows, min(rank, rows, wide)),
        "strengths": (min(rows, wide),),
        "token_metric": (width, width),
        "token_weights": (rows,),
    }
    for part, shape in expected.items():
        tensor = getattr(module, part)
        if tensor is None:
            continue
        wrong_dtype = tensor.dtype is not torch.float64 if part in _DOUBLE else tensor.dtype not in PLAIN
        if tuple(tensor.shape) != shape or not rows or wrong_dtype:
            raise ActValueError(
                f"{name}: {part} is {tensor.dtype} of shape {list(tensor.shape)}, expected "
                f"{'float64' if part in _DOUBLE else 'floating point numbers'} of shape {list(shape)} (save it again)"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ActValueError(f"{name}: {part} has values that are not finite (the file is damaged; save it again)")
