"""Fingerprints of base rows, by which an adapter recognizes its base, and the record of a module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from act_peft.channels.kinds import ChannelKind
from act_peft.errors import ActValueError

LENGTH = 16  # hexadecimal digits of the SHA-256 that are kept


class Fingerprint:
    """A fingerprint that is computed from parts; `fingerprint` is the short form."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, rows: torch.Tensor) -> None:
        """Add rows of any shape. Parts along the first axis, added in order, count as the whole."""
        rounded = rows.detach().to("cpu", torch.bfloat16).contiguous()
        self._digest.update(rounded.view(torch.int16).numpy().data)

    def result(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the values, rounded to bfloat16."""
        return self._digest.hexdigest()[:LENGTH]


def fingerprint(weight: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    """Hash of rows of one module, equal for a float32 and a bfloat16 copy of them.

    Args:
        weight: selected part of the module's weight, any shape, in the module's orientation.
        bias: `[K]`, the elements of the bias for these rows, if there is a bias.

    Returns:
        16 hexadecimal digits of the SHA-256 of the values, rounded to bfloat16.
    """
    whole = Fingerprint()
    for tensor in (weight, bias):
        if tensor is not None:
            whole.add(tensor)
    return whole.result()


class BaseComparison:
    """Was an adapter made for this base? Compares recorded fingerprints of base rows with those of a base.

    Args:
        adapter: the adapter, for the message.
        base: the base, for the message, if it has a name.
    """

    def __init__(self, adapter: str, base: str | None = None) -> None:
        self._adapter, self._base = adapter, base
        self._compared = 0
        self._differing: list[str] = []

    def add_(self, module: str, recorded: str | None, found: Callable[[], str | None]) -> None:
        """Compare one module.

        Args:
            module: its name.
            recorded: the fingerprint that the adapter recorded; None if it recorded none.
            found: gives the fingerprint of the same rows of the base; None if they cannot be read. Called only where
                there is something to compare.
        """
        current = None if recorded is None else found()
        if current is not None:
            self._compared += 1
            if current != recorded:
                self._differing.append(module)

    def note(self) -> str | None:
        """The result as a part of a sentence; None if no module differs."""
        if not self._differing:
            return None
        than = "" if self._base is None else f" than {self._base}"
        return (
            f"{self._adapter} was made for a base with other weights{than}: {len(self._differing)} of "
            f"{self._compared} modules differ, the first is {self._differing[0]}"
        )


def recorded_base(modules: Any, module: str) -> str | None:
    """Fingerprint of the base rows of a module, from `adapted_modules`; None if there is none."""
    entry = modules.get(module) if isinstance(modules, Mapping) else None
    found = entry.get("base") if isinstance(entry, Mapping) else None
    return found if isinstance(found, str) else None


def recorded_sample(modules: Any, module: str) -> str | None:
    """Hash of a few fixed rows of the base's weight, from `adapted_modules`; None if there is none."""
    entry = modules.get(module) if isinstance(modules, Mapping) else None
    found = entry.get("sample") if isinstance(entry, Mapping) else None
    return found if isinstance(found, str) else None


def module_record(
    kind: ChannelKind, *, selected: int, channels: int, base: str | None, sample: str | None
) -> dict[str, Any]:
    """An entry of `adapted_modules`.

    Args:
        kind: of the module.
        selected: number of its selected channels K.
        channels: number of its channels C.
        base: fingerprint of the base rows; None where they cannot be read.
        sample: hash of a few rows of the base's weight that do not depend on what is selected; None likewise.
    """
    return {"kind": kind.value, "selected": selected, "channels": channels, "base": base, "sample": sample}


def _check_record(modules: Any) -> None:
    """Check the `adapted_modules` of a file.

    Raises:
        ActValueError: if its form is wrong.
    """
    if modules is None:
        return
    if not isinstance(modules, Mapping):
        found: Any = f"{modules!s:.80}"
    else:
        found = next((f"{each!s:.160} for {name}" for name, each in modules.items() if not _is_record(each)), None)
    if found is not None:
        raise ActValueError(
            f"adapted_modules: got {found}, expected module name -> "
            "{'kind': str, 'selected': int, 'channels': int, 'base': str} (adapter_config.json is damaged)"
        )


def _is_record(entry: Any) -> bool:
    """Whether a value is an entry of `adapted_modules`. Those of version 0.1 lack kind and channels."""
    if not isinstance(entry, Mapping) or type(entry.get("selected")) is not int or entry["selected"] < 0:
        return False
    channels = entry.get("channels")
    texts = all(isinstance(entry.get(name), (str, type(None))) for name in ("base", "kind"))
    return texts and (channels is None or (type(channels) is int and entry["selected"] <= channels))
