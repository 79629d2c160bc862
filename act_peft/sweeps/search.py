"""Trying rules of weights and fits on held-out data, one setting after the other."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from act_peft.channels.kinds import weight_of
from act_peft.channels.rows import exact_arithmetic
from act_peft.fitting import CollectedInputs, FitSettings, FittedTransfer
from act_peft.fitting.pair import FittedPair
from act_peft.sweeps.changes import all_changes, rank_changes, row_changes, rule_changes, rule_channels
from act_peft.sweeps.choice import allowed_rows, lowest_loss
from act_peft.sweeps.methods import Method
from act_peft.sweeps.rows import Measurement, SweepRow
from act_peft.sweeps.weight_rules import Interpolation, WeightRule
from act_peft.transfer.whole import Changes, WholeMoves

KEEP_WEIGHTS = (0.3, 1.0, 3.0, 10.0)
_RIDGE = 0.03
# Ridges that are tried with a prior: where skills hardly conflict, a share of everything may well move.
_PRIOR_RIDGES = (0.3, 3.0)
_REFINEMENTS = 2  # scales of interpolation and keep weights between those of the grid
_STEP = math.sqrt(10.0)  # from one keep weight of the grid to the next, about
TOKENS = 0.2  # share of the tokens that move beside factors of low rank


class Search:
    """Measures settings of the base in place, and keeps the rows.

    Args:
        moves: entered, of the parameters of all pairs.
        pairs: the modules that may move.
        measure: measures the base as it is.
        base: the row of the base.
        bar: counts the settings; its total grows with what is still to do.
        max_keep_loss: as in `sweep`.

    Attributes:
        rows: what was measured.
    """

    def __init__(
        self,
        moves: WholeMoves,
        pairs: Sequence[FittedPair],
        measure: Callable[[], Measurement],
        base: SweepRow,
        bar: tqdm[None],
        *,
        max_keep_loss: float,
    ) -> None:
        self._moves, self._pairs, self._measure, self._base = moves, pairs, measure, base
        self._bar, self._max_keep_loss = bar, max_keep_loss
        self._device = weight_of(pairs[0].base).device.type
        self.rows: list[SweepRow] = []

    def try_rules(self, rules: Sequence[WeightRule]) -> None:
        """Measure rules of weights."""
        self._expect(len(rules))
        for rule in rules:
            self._try(
                rule_changes(self._pairs, rule),
                rule.method,
                rule.settings,
                density=rule.share,
                scale=rule.factor,
                num_channels=rule_channels(self._pairs, rule),
            )

    def refine_interpolation(self) -> None:
        """Measure interpolations between the best allowed one and the next that is not allowed."""
        for _ in range(_REFINEMENTS):
            rows = [row for row in self.rows if row.method is Method.INTERPOLATION and row.transfer_scale > 0]
            allowed = allowed_rows(rows, self._base, max_keep_loss=self._max_keep_loss)
            best = lowest_loss(allowed)
            start = 0.0 if best is None else best.transfer_scale
            above = [row for row in rows if row.transfer_scale > start]
            nearest = min(above, key=lambda row: row.transfer_scale, default=None)
            if nearest is None or nearest in allowed:
                return
            self.try_rules([Interpolation((start + nearest.transfer_scale) / 2)])

    def try_fits(
        self,
        inputs: CollectedInputs,
        *,
        keep_weights: Sequence[float],
        methods: Sequence[Method],
        densities: Sequence[float],
        ranks: Sequence[int],
    ) -> None:
        """Measure fits, in the neighbourhood of the best so far.

        First the keep weights with a small ridge and without a prior. Then the best of them with a prior, the best
        allowed interpolation. Then keep weights between the best one and the next lower one, which gives more of the
        ability at more cost. Last the shares of rows and the ranks of the best.
        """
        fits: dict[FitSettings, SweepRow] = {}

        def try_(settings: FitSettings) -> SweepRow:
            if settings not in fits:
                self._expect(1)
                fits[settings] = self._try_fit(inputs, settings)
            return fits[settings]

        def best() -> FitSettings:
            row = self._best(list(fits.values()))
            return next(settings for settings, found in fits.items() if found is row)

        for weight in keep_weights:
            try_(FitSettings(keep_weight=weight, ridge=_RIDGE))
        prior = self._prior()
        for ridge in _PRIOR_RIDGES if prior else ():
            try_(FitSettings(keep_weight=best().keep_weight, ridge=ridge, prior_scale=prior))
        for _ in range(_REFINEMENTS):
            try_(dataclasses.replace(best(), keep_weight=self._between(best(), fits)))
        densities = densities if Method.FITTED_ROWS in methods else ()
        ranks = ranks if Method.FITTED_RANK in methods else ()
        if densities or ranks:
            self._try_parts(inputs, best(), densities, ranks)

    def _try_fit(self, inputs: CollectedInputs, settings: FitSettings) -> SweepRow:
        fitted = self._solve(inputs, settings, max_rank=0)
        rows = sum(len(module.delta) for module in fitted.modules.values())
        given = dataclasses.asdict(settings)
        return self._try(all_changes(fitted), Method.FITTED, given, density=1.0, scale=1.0, num_channels=rows)

    def _try_parts(
        self, inputs: CollectedInputs, settings: FitSettings, densities: Sequence[float], ranks: Sequence[int]
    ) -> None:
        fitted = self._solve(inputs, settings, max_rank=max(ranks, default=0))
        given = dataclasses.asdict(settings)
        total = sum(len(module.delta) for module in fitted.modules.values())
        has_embedding = any(module.is_embedding for module in fitted.modules.values())
        self._expect(len(densities) + (1 + has_embedding) * len(ranks))
        for density in densities:
            changes, count = row_changes(fitted, density)
            what = {**given, "density": density}
            self._try(changes, Method.FITTED_ROWS, what, density=density, scale=1.0, num_channels=count)
        for rank, factored in itertools.product(ranks, (False, True)[: 1 + has_embedding]):
            of_embedding: dict[str, Any] = {"embedding_rank": rank} if factored else {"tokens": TOKENS}
            changes, count = rank_changes(fitted, rank, **of_embedding)
            what = {**given, "rank": rank, **of_embedding}
            self._try(changes, Method.FITTED_RANK, what, density=count / total, scale=1.0, num_channels=count)

    def _solve(self, inputs: CollectedInputs, settings: FitSettings, *, max_rank: int) -> FittedTransfer:
        self._moves.restore_()  # the differences are those of the base's own weights
        with exact_arithmetic(self._device):
            return inputs.solve(**dataclasses.asdict(settings), max_rank=max_rank)

    def _try(
        self,
        changes: Changes,
        method: Method,
        settings: Mapping[str, float],
        *,
        density: float,
        scale: float,
        num_channels: int,
    ) -> SweepRow:
        with exact_arithmetic(self._device):
            self._moves.move_(changes)
        found = self._measure()
        row = SweepRow(found.ability, found.keep, density, scale, num_channels, method, settings)
        self.rows.append(row)
        self._bar.update()
        return row

    def _expect(self, number: int) -> None:
        self._bar.total = (self._bar.total or 0) + number
        self._bar.refresh()

    def _best(self, rows: Sequence[SweepRow]) -> SweepRow:
        """The lowest loss among the allowed rows; if there is none, the row that keeps most."""
        allowed = lowest_loss(allowed_rows(rows, self._base, max_keep_loss=self._max_keep_loss))
        return allowed or min(rows, key=lambda row: row.keep_rise(self._base))

    def _prior(self) -> float:
        """λ of the best allowed interpolation that was measured, or of the smallest one; 0 without any."""
        rows = [row for row in self.rows if row.method is Method.INTERPOLATION]
        return self._best(rows).transfer_scale if rows else 0.0

    def _between(self, best: FitSettings, fits: Mapping[FitSettings, SweepRow]) -> float:
        """A keep weight between that of the best fit and the next one on the side where more is to be had."""
        others = {s.keep_weight for s in fits if (s.ridge, s.prior_scale) == (best.ridge, best.prior_scale)}
        allowed = bool(allowed_rows([fits[best]], self._base, max_keep_loss=self._max_keep_loss))
        # A lower weight gives more of the ability and keeps less.
        side = [w for w in others if (w < best.keep_weight if allowed else w > best.keep_weight)]
        if not side:
            return best.keep_weight / _STEP if allowed else best.keep_weight * _STEP**2
        return math.sqrt(best.keep_weight * (max(side) if allowed else min(side)))
