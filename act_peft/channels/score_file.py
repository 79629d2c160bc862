"""The file of scores; its layout is told at `ChannelScores.save`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from act_peft.channels.origin import Origin
from act_peft.channels.score_kinds import ScoreKind
from act_peft.channels.score_sums import rows_of
from act_peft.channels.spread import Spread
from act_peft.disk import tensorfile
from act_peft.errors import ActError, ActValueError

_KIND = "channel scores"
# Version 2 has more metadata, version 3 two rows a module (contrast), version 4 a spread (three rows) or the origin.
# What needs none of them is written as version 1.
_PLAIN_VERSION, _SCORE_VERSION, _CONTRAST_VERSION, _VERSION = 1, 2, 3, 4


@dataclass(frozen=True)
class StoredScores:
    """What a file of scores holds. As it was read, only its form is checked.

    Attributes:
        sums: module name -> sums over the tokens, float64 `[C]`.
        num_tokens: number of tokens.
        kind: the meaning of the scores.
        num_comparable: module name -> number of comparable channels, where it is not all of them.
        keep: sums and number of tokens on the data to keep; only for scores by contrast.
        spread: how the scores vary from sample to sample.
        origin: the models that they were made with.
    """

    sums: Mapping[str, torch.Tensor]
    num_tokens: Any
    kind: str | ScoreKind
    num_comparable: Mapping[str, int]
    keep: tuple[Mapping[str, torch.Tensor], Any] | None
    spread: Spread | None
    origin: Origin | None


def write_scores(
    path: str | os.PathLike[str], stored: StoredScores, *, progress: tuple[str, int, str] | None = None
) -> None:
    """Write the file, whole or not at all, in the oldest version that holds everything.

    Raises:
        ActValueError: `path` is a folder or lies in a folder that does not exist.
    """
    metadata: dict[str, Any] = {"modules": list(stored.sums), "num_tokens": stored.num_tokens}
    if progress is not None:
        metadata |= {"progress": list(progress)}
    version, tensors, spread = _PLAIN_VERSION, stored.sums, stored.spread
    meaning = {"score": ScoreKind(stored.kind).value, "num_comparable": stored.num_comparable}
    if stored.kind is not ScoreKind.ACTIVATION or stored.num_comparable:
        version = _SCORE_VERSION
        metadata |= meaning
    if stored.keep is not None:
        version, (kept, num_keep_tokens) = _CONTRAST_VERSION, stored.keep
        metadata |= {"num_keep_tokens": num_keep_tokens}
        tensors = {name: torch.stack([sums, kept[name]]) for name, sums in stored.sums.items()}
    if spread is not None:
        version = _VERSION
        metadata |= meaning | {"num_samples": spread.num_samples, "token_squares": spread.token_squares}
        tensors = {
            name: torch.stack([sums, spread.squares[name], spread.products[name]])
            for name, sums in stored.sums.items()
        }
    if stored.origin is not None:
        version = _VERSION
        metadata |= {"origin": stored.origin.to_json()}
    tensorfile.write(path, _KIND, version, tensors, metadata)


def read_scores(path: str | os.PathLike[str]) -> StoredScores:
    """Read a file of scores.

    Raises:
        ActValueError: the file is missing, damaged, holds no scores, or is of a newer version.
    """
    tensors, metadata = tensorfile.read(path, _KIND, _VERSION)
    modules = metadata.get("modules")
    if not isinstance(modules, list) or sorted(map(str, modules)) != sorted(tensors):
        raise ActValueError(
            f"{path}: got tensors for {len(tensors)} modules, expected exactly those that its metadata lists "
            "(save the scores again)"
        )
    comparable = metadata.get("num_comparable", {})
    if not isinstance(comparable, dict):
        raise ActValueError(f"{path}: num_comparable: got {comparable!r:.100}, expected an object of counts")
    sums = {name: tensors[name] for name in modules}
    kind, keep, spread = metadata.get("score", ScoreKind.ACTIVATION), None, None
    try:
        if kind == ScoreKind.CONTRAST.value:
            sums, kept = rows_of(sums, 2)
            keep = (kept, metadata.get("num_keep_tokens"))
        if "num_samples" in metadata:
            sums, squares, products = rows_of(sums, 3)
            numbers: Any = (metadata["num_samples"], metadata.get("token_squares"))
            spread = Spread(squares, products, *numbers)
        origin = Origin.from_json(metadata["origin"]) if "origin" in metadata else None
    except ActError as error:
        raise ActValueError(f"{path}: {error}") from error
    return StoredScores(sums, metadata.get("num_tokens"), kind, comparable, keep, spread, origin)


def read_progress(path: str | os.PathLike[str]) -> tuple[str, int, str]:
    """The progress of an interrupted run.

    Raises:
        ActValueError: the file is missing or damaged, or holds scores without it.
    """
    progress = tensorfile.read(path, _KIND, _VERSION)[1].get("progress")
    if not isinstance(progress, list) or [type(part) for part in progress] != [str, int, str]:
        raise ActValueError(
            f"{path}: got scores of a finished run, expected a checkpoint of an interrupted one (take another name)"
        )
    return progress[0], progress[1], progress[2]
