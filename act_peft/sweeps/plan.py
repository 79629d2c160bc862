"""The checked arguments of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_peft.channels.selection import Normalization, Scope
from act_peft.checks import ascending, finite_number, member_of, whole_number
from act_peft.errors import ActTypeError, ActValueError
from act_peft.sweeps.methods import FITTED, WEIGHT_RULES, Method
from act_peft.sweeps.search import KEEP_WEIGHTS

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
ROW_DENSITIES = (0.1, 0.2, 0.4)
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
RANKS = (16, 64)
MAX_DROP = 0.05
MAX_KEEP_LOSS = 0.03


@dataclass(frozen=True)
class Plan:
    """What a sweep will try; attributes as the arguments of `sweep`, sorted.

    Attributes:
        row_densities: of the rows of a fit.
        max_drop: None if the rule goes by losses.
        max_keep_loss: None if the rule goes by accuracies.
    """

    methods: tuple[Method, ...]
    densities: list[float]
    row_densities: list[float]
    scales: list[float]
    scope: Scope
    normalize: Normalization
    max_drop: float | None
    max_keep_loss: float | None
    keep_weights: list[float]
    ranks: list[int]

    @property
    def fits(self) -> bool:
        """Whether fits are tried."""
        return Method.FITTED in self.methods

    @property
    def weight_methods(self) -> bool:
        """Whether anything but scored channels is tried."""
        return any(method is not Method.CHANNELS for method in self.methods)

    @property
    def search_limit(self) -> float:
        """The rise of a loss that the search for a fit keeps to."""
        return MAX_KEEP_LOSS if self.max_keep_loss is None else self.max_keep_loss


def make_plan(
    *,
    has_scores: bool,
    held_out: tuple[Any, Any],
    to_fit: tuple[Any, Any],
    densities: Sequence[float] | None,
    scales: Sequence[float] | None,
    scope: str | Scope,
    normalize: str | Normalization,
    max_drop: float | None,
    max_keep_loss: float | None,
    methods: Sequence[str | Method] | None,
    keep_weights: Sequence[float] | None,
    ranks: Sequence[int] | None,
) -> Plan:
    """Check the arguments of `sweep`.

    Args:
        has_scores: whether there are scores.
        held_out: held-out data of the ability and to keep.
        to_fit: data of both to fit on, or None.
        densities: as in `sweep`.
        scales: as in `sweep`.
        scope: as in `sweep`.
        normalize: as in `sweep`.
        max_drop: as in `sweep`.
        max_keep_loss: as in `sweep`.
        methods: as in `sweep`.
        keep_weights: as in `sweep`.
        ranks: as in `sweep`.

    Raises:
        ActTypeError, ActValueError: as `sweep`.
    """
    has_fit = _check_data(held_out, to_fit)
    chosen = _methods(methods, has_scores=has_scores, has_fit=has_fit)
    unused = {"keep_weights": keep_weights, "ranks": ranks}
    needed = {"keep_weights": Method.FITTED, "ranks": Method.FITTED_RANK}
    for name, value in unused.items():
        if value is not None and needed[name] not in chosen:
            raise ActValueError(
                f"{name}: got {value!r:.80}, but {needed[name].value!r} is not among the methods, expected none"
            )
    if max_drop is not None and max_keep_loss is not None:
        raise ActValueError(
            f"max_drop: got {max_drop!r:.80} beside max_keep_loss, expected one of them (accuracy or loss)"
        )
    if max_drop is None and max_keep_loss is None:
        max_drop, max_keep_loss = (MAX_DROP, None) if chosen == (Method.CHANNELS,) else (None, MAX_KEEP_LOSS)
    return Plan(
        methods=chosen,
        densities=ascending(DENSITIES if densities is None else densities, "densities", above=0, most=1),
        row_densities=ascending(ROW_DENSITIES if densities is None else densities, "densities", above=0, most=1),
        scales=ascending(SCALES if scales is None else scales, "scales", nonzero=True),
        scope=member_of(Scope, scope, "scope"),
        normalize=member_of(Normalization, normalize, "normalize"),
        max_drop=None if max_drop is None else finite_number(max_drop, "max_drop", least=0),
        max_keep_loss=None if max_keep_loss is None else finite_number(max_keep_loss, "max_keep_loss", least=0),
        keep_weights=ascending(KEEP_WEIGHTS if keep_weights is None else keep_weights, "keep_weights", above=0),
        ranks=_ranks(RANKS if ranks is None else ranks),
    )


def _check_data(held_out: tuple[Any, Any], to_fit: tuple[Any, Any]) -> bool:
    """Whether there are data to fit on."""
    names = ("fit_ability_dataloader", "fit_keep_dataloader")
    missing = [name for name, data in zip(names, to_fit, strict=True) if data is None]
    if len(missing) == 1:
        raise ActValueError(f"{missing[0]}: got None, expected batches to fit on, of the ability and to keep")
    measured = {id(data) for part in held_out for data in (part.values() if isinstance(part, Mapping) else [part])}
    for name, part in zip(names, to_fit, strict=True):
        for data in part.values() if isinstance(part, Mapping) else [part]:
            if data is not None and id(data) in measured:
                raise ActValueError(
                    f"{name}: got the held-out batches, expected other examples (a fit looks better on its own)"
                )
    return not missing


def _methods(methods: Sequence[str | Method] | None, *, has_scores: bool, has_fit: bool) -> tuple[Method, ...]:
    possible = [
        *([Method.CHANNELS] if has_scores else []),
        *WEIGHT_RULES,
        *(FITTED if has_fit else []),
    ]
    if methods is None:
        return (Method.CHANNELS,) if has_scores and not has_fit else tuple(possible)
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise ActTypeError(f"methods: got {methods!r:.80}, expected a list of methods")
    asked = {member_of(Method, method, "methods") for method in methods}
    for method in asked - set(possible):
        why = {
            Method.BASE: "is measured anyway, expected others",
            Method.CHANNELS: "needs scores, expected some (from localize)",
        }
        raise ActValueError(
            f"methods: {method.value!r} {why.get(method, 'needs data to fit on, expected fit_ability_dataloader')}"
        )
    for method, given, name in ((Method.CHANNELS, has_scores, "scores"), (Method.FITTED, has_fit, "data to fit on")):
        if given and method not in asked:
            raise ActValueError(f"methods: {method.value!r} is missing, but there are {name}, expected it (or none)")
    if not asked:
        raise ActValueError("methods: got none, expected at least one")
    return tuple(method for method in possible if method in asked)


def _ranks(ranks: Any) -> list[int]:
    if isinstance(ranks, str) or not isinstance(ranks, Sequence):
        raise ActTypeError(f"ranks: got {ranks!r:.80}, expected a list of integers")
    return sorted({whole_number(rank, "ranks", least=1) for rank in ranks})
