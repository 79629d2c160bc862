"""Running sums of the differences of activations, and of how they vary from sample to sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.channels.spread import Spread
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.sums import ChannelSums
from act_peft.processes import sum_over_processes


class Differences:
    """Sums over all samples so far of S, S^2 and S n: a sample's sum of differences S and its number of tokens n.

    Args:
        candidates: the compared modules.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._sums, self._squares, self._products = (ChannelSums(candidates.num_comparable) for _ in range(3))
        self._counts = torch.zeros(2, dtype=torch.float64, device="cpu")  # samples with a token, sum of n^2

    @property
    def num_tokens(self) -> int:
        """Number of tokens summed."""
        return self._sums.num_tokens

    def add_(self, sums: Mapping[str, torch.Tensor], per_sample: torch.Tensor) -> None:
        """Add the sums `[B, C]` and the numbers of tokens `[B]` of a batch.

        Raises:
            ActValueError: a sum is not finite.
        """
        num_tokens = int(per_sample.sum())
        counts: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        for values in sums.values():
            counts.setdefault((values.device, values.dtype), per_sample.to(values))
        self._sums.add_({name: values.sum(0) for name, values in sums.items()}, num_tokens)
        self._squares.add_({name: values.square().sum(0) for name, values in sums.items()}, num_tokens)
        self._products.add_({n: counts[v.device, v.dtype] @ v for n, v in sums.items()}, num_tokens)
        self._counts += torch.stack([(per_sample > 0).sum(), per_sample.square().sum()])

    def resume_(self, scores: ChannelScores) -> None:
        """Go on from the `scores` of an earlier run over the same channels.

        Raises:
            ActValueError: they hold no spread.
        """
        spread = scores.spread
        if spread is None:
            raise ActValueError("got scores without a spread, expected those of an interrupted run")
        tokens = scores.num_tokens
        self._sums.put_(scores.sums, tokens)
        self._squares.put_(spread.squares, tokens)
        self._products.put_(spread.products, tokens)
        self._counts.copy_(torch.tensor([spread.num_samples, spread.token_squares]))

    def gather_(self) -> None:
        """Replace the sums and numbers by those of all processes together; all of them must call this."""
        for sums in (self._sums, self._squares, self._products):
            sums.gather_()
        sum_over_processes([self._counts])

    def scores(self, *, keep: ChannelScores | None = None, spread: bool = True) -> ChannelScores:
        """The scores by activation, or by contrast to those on the data to keep."""
        padded = self._candidates.padded
        num_samples, token_squares = map(int, self._counts.tolist())
        return ChannelScores(
            padded(self._sums.sums),
            self._sums.num_tokens,
            kind=ScoreKind.ACTIVATION if keep is None else ScoreKind.CONTRAST,
            num_comparable=self._candidates.num_comparable,
            keep=keep,
            spread=Spread(padded(self._squares.sums), padded(self._products.sums), num_samples, token_squares)
            if spread and keep is None
            else None,
        )
