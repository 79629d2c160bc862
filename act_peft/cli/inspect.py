"""`act-peft inspect`: the content of a file of scores, a mask, a fitted transfer or an adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from act_peft.cli.imports import importing
from act_peft.errors import ActValueError
from act_peft.plain import one_line
from act_peft.tables import aligned

SUMMARY = "Show the content of a file of scores, a mask, a fitted transfer or an adapter."
EXAMPLE = "act-peft inspect ability --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "path", type=Path, help="file of scores, of a mask or of a fitted transfer, or folder of an adapter"
    )
    parser.add_argument("--all", action="store_true", help="list every module below the kinds of modules")
    parser.add_argument("--json", action="store_true", help="print JSON, with every module")


def run(arguments: argparse.Namespace) -> None:
    """Read the file and print a summary."""
    summary = describe(arguments.path)
    if arguments.json:
        print(json.dumps(summary, indent=2).replace("\x7f", "\\u007f"))
        return
    modules = summary.pop("modules")
    for key, value in summary.items():
        print(f"{key.replace('_', ' ')}: {one_line(value)}")
    _print_table(f"{len(modules)} modules by kind", _by_kind(modules))
    if arguments.all:
        _print_table("every module", modules)
    elif len(modules) > 1:
        print("(--all lists every module)")


def _print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A table of numbers by name, the greatest of the last column first."""
    print(f"{title}:")
    if not rows:
        return
    columns = list(next(iter(rows.values())))
    numeric = [name for name in columns if isinstance(next(iter(rows.values()))[name], (int, float))]
    order = sorted(rows, key=lambda name: -rows[name][numeric[-1]]) if numeric else list(rows)
    head = ["", *(name.replace("_", " ") for name in columns)]
    lines = [[name, *(_cell(rows[name].get(column)) for column in columns)] for name in order]
    for line in aligned([head, *lines]):
        print(f"  {line}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _by_kind(modules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The numbers of the modules of each kind together: counts added, means weighted, the greatest maximum."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, entry in modules.items():
        groups.setdefault(name.rpartition(".")[2], []).append(entry)
    found: dict[str, dict[str, Any]] = {}
    for kind, entries in groups.items():
        row: dict[str, Any] = {"modules": len(entries)}
        for key, first in entries[0].items():
            values = [entry[key] for entry in entries if isinstance(entry.get(key), (int, float))]
            if isinstance(first, bool) or not isinstance(first, (int, float)):
                continue
            if key == "mean":
                total = sum(entry["channels"] for entry in entries)
                row[key] = sum(entry["channels"] * entry["mean"] for entry in entries) / total
            else:
                row[key] = max(values) if key in ("max", "directions") else sum(values)
        if "selected" in row and row.get("channels"):
            row["density"] = row["selected"] / row["channels"]
        found[kind] = row
    return found


def describe(path: Path) -> dict[str, Any]:
    """The content of a file as plain values; `modules` maps each module to its numbers.

    Raises:
        ActValueError: the file was not written by act_peft, or is damaged.
    """
    with importing():
        from act_peft import ActConfig, ChannelMask, ChannelScores, FittedTransfer
        from act_peft.disk import tensorfile

    if path.is_dir():
        _check_adapter(path)
        config = ActConfig.from_pretrained(str(path))  # which compares it with the tensors
        return {
            "kind": "adapter",
            "base": config.base_model_name_or_path,
            "donor": config.donor,
            "transfer_scale": config.transfer_scale,
            "trainable": config.trainable,
            "density": config.density,
            **_describe_byproducts(path),
            "modules": config.adapted_modules or {},
        }
    kind = tensorfile.kind_of(path)
    if kind == "channel scores":
        scores = ChannelScores.load(path)
        return {
            "kind": kind,
            **_describe_origin(scores.origin),
            "score": scores.kind.value,
            "tokens": scores.num_tokens,
            "channels": sum(len(values) for values in scores.values()),
            "modules": {
                name: {"channels": len(values), "mean": round(float(values.mean()), 6), "max": float(values.max())}
                for name, values in scores.items()
            },
        }
    if kind == "fitted transfer":
        return _describe_fitted(FittedTransfer.load(path))
    mask = ChannelMask.load(path)
    return {
        "kind": kind,
        **_describe_origin(mask.origin),
        "selected": mask.num_selected,
        "density": mask.density,
        "modules": {
            name: {"selected": index.numel(), "channels": mask.num_channels[name]} for name, index in mask.items()
        },
    }


def _describe_origin(origin: Any) -> dict[str, Any]:
    """The two models that scores or a mask came from, where they are known."""
    return {} if origin is None else {"base": origin.base.name, "donor": origin.donor.name}


def _describe_byproducts(folder: Path) -> dict[str, Any]:
    """What an adapter's file holds beside deltas, if anything."""
    from act_peft.adapter.file import AdapterFolder

    with AdapterFolder(folder) as adapter:
        found = adapter.byproducts
    return {
        **({"tensors_of_the_base": sorted(found.of_base)} if found.of_base else {}),
        **({"saved_as_a_whole": sorted(found.saved)} if found.saved else {}),
        **({"tokens": {n: rows.index.tolist() for n, rows in found.tokens.items()}} if found.tokens else {}),
    }


def _describe_fitted(fitted: Any) -> dict[str, Any]:
    record = fitted.record
    return {
        "kind": "fitted transfer",
        "base": record.base,
        "donors": list(record.donors),
        "keep_weight": record.settings.keep_weight,
        "ridge": record.settings.ridge,
        "prior_scale": record.settings.prior_scale,
        "tokens": list(record.num_tokens),
        "modules": {
            name: {
                "kind": module.kind.value,
                "rows": len(module.delta),
                "gain": float(module.gains.sum()),
                "directions": 0 if module.directions is None else module.directions.shape[1],
            }
            for name, module in fitted.modules.items()
        },
    }


def _check_adapter(folder: Path) -> None:
    """Check that a folder holds an ACT adapter.

    Raises:
        ActValueError: it holds no adapter, or one of a different method.
    """
    from peft.utils import WEIGHTS_NAME as PICKLED

    from act_peft.adapter.file import CONFIG, TENSORS
    from act_peft.disk.checkpoint import read_json

    expected = "expected an ACT adapter, or a file of a mask or of scores"
    if not (folder / CONFIG).is_file():
        raise ActValueError(f"{folder}: got a folder without {CONFIG}, {expected} (name the file, or the adapter)")
    kind = read_json(folder, CONFIG).get("peft_type")
    if kind != "ACT":
        raise ActValueError(
            f"{folder}: got an adapter of type {str(kind)[:40]}, {expected} (use PEFT for adapters of other methods)"
        )
    if not (folder / TENSORS).is_file() and not (folder / PICKLED).is_file():
        raise ActValueError(f"{folder}: has no {TENSORS}, expected the adapter's tensors (copy it again)")
