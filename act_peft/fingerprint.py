"""A fingerprint of base rows: by it an adapter recognises the base that it was made for."""

from __future__ import annotations

import hashlib

import torch

LENGTH = 16  # hexadecimal digits kept of the sha256


class Fingerprint:
    """A fingerprint in the making; `fingerprint` is the short form."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, rows: torch.Tensor) -> None:
        """Add rows, any shape; adding parts along the first axis one after the other equals adding the whole."""
        rounded = rows.detach().to("cpu", torch.bfloat16).contiguous()
        self._digest.update(rounded.view(torch.int16).numpy().data)

    def result(self) -> str:
        """16 hexadecimal digits of the sha256 over the values rounded to bfloat16."""
        return self._digest.hexdigest()[:LENGTH]


def fingerprint(weight: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    """Hash of some rows of one module, the same for a float32 and a bfloat16 copy of them.

    Args:
        weight: selected part of the module's weight, any shape, in the module's orientation.
        bias: `[K]`, the elements of the bias that belong to it, if there is a bias.

    Returns:
        16 hexadecimal digits of the sha256 over the values rounded to bfloat16.
    """
    whole = Fingerprint()
    for tensor in (weight, bias):
        if tensor is not None:
            whole.add(tensor)
    return whole.result()
