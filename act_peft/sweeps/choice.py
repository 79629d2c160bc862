"""Which row of a sweep's table to take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from act_peft.sweeps.methods import Method
from act_peft.sweeps.rows import SweepRow

_ROUNDING = 1e-9  # tolerance for rounding in differences


def pareto_front(rows: Iterable[SweepRow]) -> tuple[SweepRow, ...]:
    """The rows that no other row beats, by the accuracy on the ability and the mean accuracy on the skills to keep.

    A row beats another one if both accuracies are at least as high and one is higher. Of rows with equal accuracies
    only the one with the lowest density stays, then the lowest transfer scale.

    Returns:
        The rows, with the accuracy on the ability ascending, so that on the skills to keep descends.
    """
    front: list[SweepRow] = []
    order = sorted(rows, key=lambda row: (-row.ability.accuracy, -row.keep_accuracy, *_cost(row)))
    for row in order:
        if not front or row.keep_accuracy > front[-1].keep_accuracy:
            front.append(row)
    return tuple(reversed(front))


def loss_front(rows: Iterable[SweepRow], base: SweepRow) -> tuple[SweepRow, ...]:
    """The same by losses: on the ability, and the greatest rise on a skill to keep; those that are finite.

    Returns:
        The rows, with the loss on the ability falling, so that the rise grows.
    """
    front: list[SweepRow] = []
    finite = [row for row in rows if math.isfinite(row.ability.loss) and math.isfinite(row.keep_rise(base))]
    order = sorted(finite, key=lambda row: (row.ability.loss, row.keep_rise(base), row.method.level, *_cost(row)))
    for row in order:
        if not front or row.keep_rise(base) < front[-1].keep_rise(base):
            front.append(row)
    return tuple(reversed(front))


def recommend(rows: Iterable[SweepRow], base: SweepRow, *, max_drop: float) -> SweepRow | None:
    """The row with the highest accuracy on the ability among those that raise it and keep every skill.

    Args:
        rows: the settings.
        base: the base, for comparison.
        max_drop: greatest allowed loss of accuracy on a skill to keep, compared with the base, as a share.

    Returns:
        Among equals the row with the lowest density, then the lowest transfer scale; None if there is no such row.
    """
    allowed = [
        row
        for row in rows
        if row.ability.accuracy > base.ability.accuracy
        and all(base.keep[n].accuracy - result.accuracy <= max_drop + _ROUNDING for n, result in row.keep.items())
    ]
    return min(allowed, key=lambda row: (-row.ability.accuracy, *_cost(row)), default=None)


def allowed_rows(rows: Iterable[SweepRow], base: SweepRow, *, max_keep_loss: float) -> list[SweepRow]:
    """The rows whose loss on every skill to keep is at most this much above the base's, in nats per token."""
    return [row for row in rows if row.keep_rise(base) <= max_keep_loss + _ROUNDING]


def lowest_loss(rows: Iterable[SweepRow]) -> SweepRow | None:
    """The row with the lowest loss on the ability, the simpler among equals."""
    finite = [row for row in rows if math.isfinite(row.ability.loss)]
    return min(finite, key=lambda row: (row.ability.loss, row.method.level, *_cost(row)), default=None)


def recommend_by_loss(rows: Sequence[SweepRow], base: SweepRow, *, max_keep_loss: float) -> SweepRow | None:
    """The row with the lowest loss on the ability among those that keep every skill, or a simpler one that is as good.

    As good is what is less than one standard error above the lowest loss. Simpler is, in this order: the base,
    interpolation, other rules of weights, scored channels, a fit. Of the simplest kind that is as good, and of those
    below it, the row with the lowest loss is taken. So the choice never has a higher loss than an allowed
    interpolation, unless it is the base itself.

    Args:
        rows: the settings.
        base: the base, for comparison.
        max_keep_loss: greatest allowed rise of the loss on a skill to keep, in nats per token.

    Returns:
        None for the base: no row lowers the loss by more than the noise.
    """
    allowed = [base, *allowed_rows(rows, base, max_keep_loss=max_keep_loss)]
    best = lowest_loss(allowed)
    if best is None:
        return None
    for level in sorted({row.method.level for row in allowed}):
        simple = lowest_loss(row for row in allowed if row.method.level <= level)
        if simple is not None and not _is_better(best, simple):
            return None if simple.method is Method.BASE else simple
    return best


def _is_better(best: SweepRow, simple: SweepRow) -> bool:
    """Whether the lowest loss is lower by one standard error or more; of unknown noise it is not."""
    if best is simple:
        return False
    rise, error = simple.ability.rise_over(best.ability)
    return rise > 0 and error is not None and rise >= error


def _cost(row: SweepRow) -> tuple[float, float]:
    return row.density, row.transfer_scale
