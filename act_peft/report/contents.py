"""What a file holds, whatever its kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.disk import tensorfile
from act_peft.errors import ActError, ActValueError

if TYPE_CHECKING:
    import torch

    from act_peft.analysis.patched import Patching
    from act_peft.sweeps.result import SweepResult

_LARGEST_JSON = 64 << 20
_LONGEST_FACT = 300
# Of the metadata of files: what the page shows elsewhere.
_SHOWN_ELSEWHERE = ("modules", "num_comparable", "token_squares")


@dataclass(frozen=True, eq=False)
class Content:
    """A file that was read.

    Attributes:
        path: the file, as it was given.
        kind: scores, mask, adapter, fitted transfer, sweep or patching.
        facts: settings and provenance in words.
        scores: of a file of scores, or the gains of a fitted transfer.
        mask: of a mask or an adapter.
        scales: learned scales of an adapter, by module.
        sweep: of a sweep.
        patching: of patching.
    """

    path: str
    kind: str
    facts: Mapping[str, str]
    scores: ChannelScores | None = None
    mask: ChannelMask | None = None
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sweep: SweepResult | None = None
    patching: Patching | None = None


def read_content(path: str | os.PathLike[str]) -> Content:
    """Read a file of scores, a mask, a fitted transfer, the folder of an adapter, or the JSON of a sweep or patching.

    Raises:
        ActValueError: there is no such file, it is damaged, or of none of these kinds.
    """
    path = Path(path)
    if path.is_dir():
        return _read_adapter(path)
    if path.suffix.lower() == ".json":
        return _read_json(path)
    kind = tensorfile.kind_of(path)
    facts = _facts(tensorfile.metadata_of(path))
    if kind == "channel scores":
        return Content(str(path), "scores", facts, scores=ChannelScores.load(path))
    if kind == "channel mask":
        return Content(str(path), "mask", facts, mask=ChannelMask.load(path))
    from act_peft.fitting.fitted import FittedTransfer

    return Content(str(path), "fitted transfer", facts, scores=FittedTransfer.load(path).gains)


def short_names(paths: Sequence[str]) -> list[str]:
    """Names for several files: without folders and endings, where they are still different then."""
    short = [Path(path).stem if Path(path).suffix == ".safetensors" else Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _read_adapter(folder: Path) -> Content:
    from act_peft.adapter.config import ActConfig
    from act_peft.adapter.file import CONFIG, AdapterFolder

    if not (folder / CONFIG).is_file():
        raise ActValueError(f"{folder}: got a folder without {CONFIG}, expected an ACT adapter, or the name of a file")
    with AdapterFolder(folder) as adapter:
        config = ActConfig.from_pretrained(str(folder))
        counts, found = {}, {}
        recorded = config.adapted_modules or {}
        for name, delta in adapter.modules.items():
            count = recorded.get(name, {}).get("channels")
            if type(count) is not int:
                raise ActValueError(f"{folder}: {name}: adapted_modules does not say how many channels it has")
            counts[name], found[name] = count, delta.index
        scales = {name: delta.scales for name, delta in adapter.modules.items() if delta.scales is not None}
    fingerprints = {name: str(recorded[name].get("base")) for name in counts}
    facts = {
        "base": config.base_model_name_or_path,
        "donor": config.donor,
        "revision of the donor": config.donor_revision,
        "transfer scale": config.transfer_scale,
        "trainable": config.trainable,
        "density": config.density,
        "fingerprints of the base's rows": "; ".join(f"{name} {found}" for name, found in fingerprints.items()),
    }
    try:
        mask = ChannelMask(found, counts)
    except ActError as error:
        raise ActValueError(f"{folder}: {error} (the adapter is damaged)") from error
    return Content(str(folder), "adapter", _facts(facts), mask=mask, scales=scales)


def _read_json(path: Path) -> Content:
    if not path.is_file():
        raise ActValueError(f"{path}: no such file, expected the JSON of a sweep or of patching (check the path)")
    if path.stat().st_size > _LARGEST_JSON:
        raise ActValueError(f"{path}: got {path.stat().st_size} bytes, expected the JSON of a sweep or of patching")
    try:
        given = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ActValueError(
            f"{path}: is not JSON ({str(error)[:120]}), expected that of a sweep or patching"
        ) from error
    if not isinstance(given, dict):
        raise ActValueError(f"{path}: got {type(given).__name__}, expected the JSON of a sweep or of patching")
    try:
        if given.get("kind") == "patching":
            from act_peft.analysis.patched import Patching

            return Content(str(path), "patching", {}, patching=Patching.from_dict(given))
        from act_peft.sweeps.reading import read_sweep

        facts = {name: given.get(name) for name in ("scope", "normalize", "max_drop", "max_keep_loss", "rule")}
        return Content(str(path), "sweep", _facts(facts), sweep=read_sweep(given))
    except ActError as error:
        raise ActValueError(f"{path}: {error}") from error


def _facts(given: Mapping[str, Any]) -> dict[str, str]:
    """What is known, in words; nested values one below the other, long ones cut off."""
    found: dict[str, str] = {}
    for name, value in given.items():
        if name in _SHOWN_ELSEWHERE or value is None:
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}: {key}": text for key, text in _facts(value).items()}
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        found[str(name).replace("_", " ")] = text if len(text) <= _LONGEST_FACT else f"{text[:_LONGEST_FACT]} ..."
    return found
