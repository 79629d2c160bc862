"""A donor with all its parameters: a model in memory or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Collection

import torch

from act_peft.channels.rows import wide_difference, wide_dtype
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.parameters import Parameters
from act_peft.transfer.donors.base import OpenDonor
from act_peft.transfer.lineage import check_shapes


class FullDonor(OpenDonor):
    """A model with the base's structure; its vocabulary may differ.

    Args:
        base: the parameters of the base.
        parameters: the parameters of the donor.
        needed: names of the parameters that will be read.
        vocabulary: names of the parameters whose first axis counts tokens.
        notes: harmless differences that are known already.
        checkpoint: the donor's checkpoint, which `close` closes.

    Raises:
        ActValueError: the structure or a shape differs.
    """

    is_adapter = False

    def __init__(
        self,
        base: Parameters,
        parameters: Parameters,
        *,
        needed: Collection[str],
        vocabulary: Collection[str],
        notes: list[str],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.location = parameters.location
        self.parameters: Parameters = parameters
        self._checkpoint = checkpoint
        mine, theirs = base.shapes(), parameters.shapes()
        weights = [name for name in needed if name.endswith(".weight")]
        parameters.check_unquantized({name: None if name in vocabulary else mine[name] for name in weights})
        check_shapes(mine, theirs, donor_name=self.location, needed=needed, vocabulary=vocabulary)
        self._common = {n: theirs[n][0] for n in vocabulary if n in mine and n in theirs and theirs[n][0] < mine[n][0]}
        sizes = {(theirs[n][0], mine[n][0]) for n in vocabulary if n in mine and n in theirs and theirs[n] != mine[n]}
        self.notes = [
            *notes,
            *(
                f"the donor's vocabulary has {donor} rows and the base's {own}: the {abs(donor - own)} rows beyond "
                "the common ones are not transferred"
                for donor, own in sorted(sizes)
            ),
        ]

    def common_channels(self, module: str) -> int | None:
        """See `OpenDonor.common_channels`."""
        return self._common.get(f"{module}.weight")

    def difference(self, module: str, part: str, index: torch.Tensor, dim: int, base: torch.Tensor) -> torch.Tensor:
        """See `OpenDonor.difference`; zero for tokens that the donor does not have."""
        name = f"{module}.{part}"
        length = self.parameters.shape(name)[0]
        if dim == 0:
            common = int((index < length).sum())  # `index` is ascending
            theirs = self.parameters.rows(name, index[:common], 0)
        else:
            theirs = self.parameters.rows(name, index, dim)
            common = min(len(theirs), len(base))
        if common == len(base):
            return wide_difference(theirs[:common], base)
        difference = torch.zeros_like(base, dtype=wide_dtype(theirs.dtype, base.dtype))
        difference[:common] = wide_difference(theirs[:common], base[:common])
        return difference

    def close(self) -> None:
        """See `OpenDonor.close`."""
        if self._checkpoint is not None:
            self._checkpoint.close()
