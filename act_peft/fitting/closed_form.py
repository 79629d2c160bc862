"""`fit`: as much of the donor's difference as the data ask for, in closed form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from act_peft.batches.forward import Batch
from act_peft.channels.names import Patterns
from act_peft.checks import member_of, whole_number
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.fitting.collection import Positions
from act_peft.fitting.fitted import FittedTransfer
from act_peft.fitting.inputs import PairInputs
from act_peft.fitting.module import FittedModule
from act_peft.fitting.settings import FitSettings
from act_peft.localization.candidates import unmatched_names
from act_peft.localization.pair import Donor, open_pair
from act_peft.peft_modules import without_wrapper

_MEMORY = 1 << 30
_RANK = 128


def fit(
    base: nn.Module,
    donor: Donor | Sequence[Donor],
    ability_dataloader: Iterable[Batch] | Sequence[Iterable[Batch]],
    keep_dataloader: Iterable[Batch] | None = None,
    *,
    keep_weight: float = 1.0,
    ridge: float = 0.03,
    prior_scale: float = 0.0,
    positions: str | Positions = Positions.ALL,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
    max_rank: int = _RANK,
    max_memory: int = _MEMORY,
    show_progress: bool = True,
) -> FittedTransfer:
    """Find the change of the base that gives the donor's outputs on the ability and none on what is to be kept.

    For a linear module y = W x with D = W_donor - W_base, inputs x_a on the ability's data (the donor's own) and x_k
    on the data to keep (the base's own), the change Δ is the minimum of

        f(Δ) = mean |(D - Δ) x_a|²  +  μ mean |Δ x_k|²  +  ε m |Δ - λ D|²

        Δ = D (A + ε m λ 1) (A + μ K + ε m 1)⁻¹

    with the second moments A = mean x_a x_aᵀ and K = mean x_k x_kᵀ; m is the mean of K's diagonal and A is scaled to
    it (without data to keep, m is that of A). Nothing is trained and no labels are needed but to say which tokens
    count: both models read their data, then every input is solved once. The formula is that of model editing and
    regression-based merging (MEMIT, arXiv 2210.07229; RegMean, 2212.09849; AlphaEdit, 2410.02355), with a donor's
    outputs as the targets.

    Biases: a 1 is appended to x. Norms: every channel is a fit of its own, whose input is the normalized one.
    Embeddings: inputs are one-hot, so each token's row is a fit of its own, and A and K are how often it occurs. An
    output layer that shares the embedding's weight is fitted together with it: both uses in one objective, see
    `act_peft.fitting.tokens`. Modules with the very same input (q, k, v) share its moments.

    Several donors: `donor` and `ability_dataloader` are lists of the same length. Every ability j adds its own first
    term, with A_j scaled to m, and the prior is λ times the mean of the differences:

        Δ = (sum over j of D_j A_j + ε m λ D̄) (sum over j of A_j + μ K + ε m 1)⁻¹

    In a distributed run all processes call this at the same time, each with its own part of the batches. Every one
    reads the batches of all, so all get the same fit.

    Args:
        base: the model that receives the ability. A PEFT model counts with its active adapters.
        donor: a relative of the same structure that has the ability: a model; a PEFT model on `base`; the folder or
            Hub id of a PEFT adapter for `base`; or a list of donors.
        ability_dataloader: batches of the ability, as for `localize`; a list of them for a list of donors.
        keep_dataloader: batches of what is to be kept; None for none.
        keep_weight: μ, how much a change on the data to keep counts; 0 or greater.
        ridge: ε, greater than 0: how much a distance from the prior counts. With ε → ∞ the change is λ D: plain
            interpolation.
        prior_scale: λ, the share of the difference that is taken where no data say anything: 0 for the base.
        positions: whose inputs count: `"all"` tokens that are not padding, or only those of the `"answer"`, which the
            loss would count.
        target_modules: as in `localize`, but by default every module that has channels is fitted: also norms, the
            output layer and the token embedding.
        exclude_modules: as in `localize`, modules to leave out.
        max_rank: up to which rank LoRA adapters can be made of it; 0 for none, which halves the time of solving.
        max_memory: about how many bytes the inputs may take. What does not fit is done in several parts, for each of
            which the models read their data again.
        show_progress: show progress bars if the error stream is a terminal.

    Returns:
        The change of every module, its gain by channels, and what makes adapters of them.

    Raises:
        ActTypeError: models, batches or numbers of other types.
        ActValueError: numbers out of range; models that differ in structure; quantized weights, or weights without
            data; no batch, or a token that only one model knows; inputs that are not finite; a module that no token
            reaches, or whose input has no row for every token; moments that cannot be solved with.

    Warns:
        ActWarning: if nothing changes; for a name to select or leave out modules by that matches none.

    Example:
        >>> fitted = fit(base, donor, batches, batches)
        >>> fitted.to_adapter(fitted.gains.top(0.5, scope="module"), "ability")
        >>> model = PeftModel.from_pretrained(base, "ability")
    """
    settings = FitSettings(keep_weight=keep_weight, ridge=ridge, prior_scale=prior_scale)
    max_rank = whole_number(max_rank, "max_rank", least=0)
    max_memory = whole_number(max_memory, "max_memory", least=1)
    inputs = _opened_inputs(
        base,
        donor,
        ability_dataloader,
        keep_dataloader,
        positions=positions,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        show_progress=show_progress,
    )
    modules: dict[str, FittedModule] = {}
    num_tokens: tuple[int, ...] = ()
    for part in inputs.parts(max_memory):
        moments = inputs.collect(part)
        num_tokens = moments.num_tokens
        modules |= inputs.solve(part, moments, settings, max_rank=max_rank, release=True)
        del moments
    if not any(bool(module.delta.any()) for module in modules.values()):
        warnings.warn(
            "all changes are 0: donor and base are equal (is it the same model twice?)", ActWarning, stacklevel=2
        )
    return inputs.result(modules, inputs.record(settings, num_tokens), without_wrapper(base))


class CollectedInputs:
    """The inputs of base and donors on their data, kept in memory: any number of settings are solved from them.

    The models run once, when the object is made; then a setting costs one solve. Arguments, errors and warnings are
    those of `fit`.

    Memory: for every input of I numbers, its rows while there are fewer than I, otherwise two matrices `[I, I]`.
    """

    def __init__(
        self,
        base: nn.Module,
        donor: Donor | Sequence[Donor],
        ability_dataloader: Iterable[Batch] | Sequence[Iterable[Batch]],
        keep_dataloader: Iterable[Batch] | None = None,
        *,
        positions: str | Positions = Positions.ALL,
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
        show_progress: bool = True,
    ) -> None:
        self._base = without_wrapper(base)
        self._inputs = _opened_inputs(
            base,
            donor,
            ability_dataloader,
            keep_dataloader,
            positions=positions,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            show_progress=show_progress,
        )
        self._moments = self._inputs.collect(self._inputs.pairs)

    def solve(
        self, *, keep_weight: float = 1.0, ridge: float = 0.03, prior_scale: float = 0.0, max_rank: int = 0
    ) -> FittedTransfer:
        """The fit by one setting; arguments and errors are those of `fit`."""
        settings = FitSettings(keep_weight=keep_weight, ridge=ridge, prior_scale=prior_scale)
        rank = whole_number(max_rank, "max_rank", least=0)
        modules = self._inputs.solve(self._inputs.pairs, self._moments, settings, max_rank=rank)
        return self._inputs.result(modules, self._inputs.record(settings, self._moments.num_tokens), self._base)


def _opened_inputs(
    base: nn.Module,
    donor: Donor | Sequence[Donor],
    ability_dataloader: Any,
    keep_dataloader: Iterable[Batch] | None,
    *,
    positions: str | Positions,
    target_modules: Patterns,
    exclude_modules: Patterns,
    show_progress: bool,
) -> PairInputs:
    where = member_of(Positions, positions, "positions")
    opened, donors, ability = open_models(base, donor, ability_dataloader)
    for argument, patterns in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        unmatched = unmatched_names(opened, patterns)
        if unmatched:
            warnings.warn(f"{argument}: {unmatched} match no module that has channels", ActWarning, stacklevel=3)
    return PairInputs(
        opened,
        donors,
        ability,
        keep_dataloader,
        positions=where,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        show_progress=show_progress,
    )


def open_models(
    base: nn.Module, donor: Donor | Sequence[Donor], ability_dataloader: Any
) -> tuple[nn.Module, list[nn.Module], list[Iterable[Batch]]]:
    """Base and donors as models with plain layers, and the batches of each donor.

    Raises:
        ActTypeError, ActValueError: as `fit`.
    """
    if not isinstance(donor, (list, tuple)):
        opened, one = open_pair(base, cast(Donor, donor), merged=True)
        return opened, [one], [ability_dataloader]
    if not donor:
        raise ActValueError("donor: got an empty list, expected at least one donor")
    if not isinstance(ability_dataloader, (list, tuple)):
        raise ActTypeError(
            f"ability_dataloader: got {type(ability_dataloader).__name__} with a list of donors, expected a list of "
            "dataloaders, one for each donor"
        )
    if len(donor) != len(ability_dataloader):
        raise ActValueError(
            f"ability_dataloader: got {len(ability_dataloader)} for {len(donor)} donors, expected as many"
        )
    pairs = [open_pair(base, one, merged=True) for one in donor]
    return pairs[0][0], [one for _, one in pairs], list(ability_dataloader)
