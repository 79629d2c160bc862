"""`sweep`: what to take of a donor, measured on held-out data without training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from tqdm import tqdm

from act_peft.batches.evaluation import evaluation
from act_peft.batches.repeats import without_repeats
from act_peft.channels.kinds import channel_kind, num_channels, weight_of
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Normalization, Scope, dominance_text, select_channels
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.fitting import CollectedInputs
from act_peft.fitting.closed_form import open_models
from act_peft.fitting.pair import find_pairs
from act_peft.peft_modules import has_adapters, runnable
from act_peft.processes import all_begin, num_processes
from act_peft.shards import needs_every_process
from act_peft.sweeps.changes import parameters_of
from act_peft.sweeps.heldout import HeldOutData
from act_peft.sweeps.methods import Method
from act_peft.sweeps.plan import DENSITIES, SCALES, Plan, make_plan
from act_peft.sweeps.result import SweepResult
from act_peft.sweeps.rows import Measurement, SweepRow
from act_peft.sweeps.search import Search
from act_peft.sweeps.weight_rules import count_layers, default_rules
from act_peft.transfer.in_model import donor_for_model
from act_peft.transfer.in_place import RowMoves
from act_peft.transfer.parameters import vocabulary_parameters
from act_peft.transfer.whole import WholeMoves

__all__ = ["DENSITIES", "SCALES", "sweep"]

Dataloader = Iterable[Mapping[str, Any]]
Skills = Dataloader | Mapping[str, Dataloader]
_Data = tuple[HeldOutData, dict[str, HeldOutData]]


def sweep(
    base: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    scores: ChannelScores | None,
    ability_dataloader: Dataloader,
    keep_dataloader: Skills,
    *,
    densities: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    scope: str | Scope = Scope.GLOBAL,
    normalize: str | Normalization = Normalization.NONE,
    max_drop: float | None = None,
    max_keep_loss: float | None = None,
    methods: Sequence[str | Method] | None = None,
    fit_ability_dataloader: Dataloader | None = None,
    fit_keep_dataloader: Skills | None = None,
    keep_weights: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
    show_progress: bool = True,
) -> SweepResult:
    """Measure what the base gains and loses with parts of the donor's difference, and recommend one.

    Every setting gets its loss and token accuracy on held-out data of the ability and of the skills to keep. Nothing
    is trained: weights of the base are overwritten in place. At the end, also after an exception or Ctrl-C, the base
    has its original bytes again. What is compared (`methods`):

    - `"channels"`, if there are scores: the channels of `scores.top(density)`, for every density and scale λ,
      W_base[i, :] + λ * (W_donor[i, :] - W_base[i, :])          (arXiv 2601.09398, the transfer step).
    - `"interpolation"`, `"layer-swap"`, `"lines"`, `"ties"`, `"dare"`: rules of weights, see
      `act_peft.sweeps.weight_rules`. They need no data, and show whether anything more is worth its trouble. For
      interpolation two more scales are tried, just within the limit.
    - `"fitted"`, `"fitted-rows"`, `"fitted-rank"`, if there are data to fit on: the closed form of `fit`. The models
      read these data once; then a setting costs one solve and one pass over the held-out data. The keep weights come
      first, then a prior towards the best interpolation, then keep weights in between; last the rows that gain most
      in every module (and as large a share of the tokens), and LoRA's ranks (with the norms, and of the
      embedding once the rows of a fifth of the tokens, once factors of the same rank), of the best fit.

    One number says how much of what is kept may be lost. With `max_keep_loss` the setting with the lowest loss on the
    ability is recommended, among those that raise the loss on no skill to keep by more. If a simpler one is less than
    one standard error worse, it is taken instead: the base (no recommendation), interpolation, another rule of
    weights, scored channels, a fit. Interpolation is the limit of a fit with a large ridge and always among the rows,
    so on the held-out data the choice is never worse. With `max_drop` the rule goes by token accuracies: the highest
    on the ability, above the base's, at the cost of `max_drop` at most; among equals the lower density, then scale.
    There may be no such setting. `max_drop` is the rule of a sweep of scored channels alone, `max_keep_loss` that of
    all others, unless one of them is given.

    Loss and accuracy count the answer tokens of all batches: with labels those with `labels != -100`, shifted as in
    causal language models; without labels, every unmasked token. The first token of a sample never counts. Standard
    errors are by samples, and of differences between two settings by samples in pairs.

    Scored channels of modules that share a weight (tied embeddings) get separate weights until the end, as with an
    adapter. With all other methods the shared weight moves, and both its uses.

    Memory beyond the models: for scored channels the originals and differences of the largest density's rows, in the
    base's dtype; for all other methods a copy of the base's weights, with a fit another one and what
    `CollectedInputs` holds; the batches, which are read once and stay on their device.

    In a distributed run all processes call this at the same time, each with its own part of the batches. Every one
    measures all batches, so all get the same table.

    Args:
        base: the model that receives the ability, without adapters. It runs in evaluation mode.
        donor: a related model with the ability: a model in memory, or the folder or Hub id of an adapter of the base.
            For scored channels alone also that of a checkpoint, from which only the rows of the largest density are
            read.
        scores: scores of the channels, from `localize`; None for the other methods alone.
        ability_dataloader: batches of held-out examples of the ability: dicts that the models accept.
        keep_dataloader: batches of a skill to keep; for several skills, a dict skill -> batches.
        densities: shares above 0 and at most 1: of the channels by scores (by default 0.01 to 0.4), and of the rows of
            a fit (by default 0.1, 0.2 and 0.4).
        scales: factors λ, finite and not 0, of scored channels, interpolation, TIES and DARE (by default 0.2 to 1).
        scope: as in `ChannelScores.top`.
        normalize: as in `ChannelScores.top`.
        max_drop: greatest allowed loss of accuracy on a skill to keep, as a share (0.05 is 5 points; the default).
        max_keep_loss: greatest allowed rise of the loss on a skill to keep, in nats per token (0.03 is the default).
        methods: what is compared. By default scored channels alone if there are scores and no data to fit on, or
            else everything that there are scores and data for.
        fit_ability_dataloader: batches of the ability to fit on; other examples than the held-out ones.
        fit_keep_dataloader: batches to keep, to fit on; a dict's are taken together.
        keep_weights: the μ of `fit` to begin with, above 0 (by default 0.3, 1, 3 and 10).
        ranks: ranks of LoRA adapters (by default 16 and 64).
        show_progress: show progress bars if the error stream is a terminal.

    Returns:
        The table. `print(result)` shows it; `result.mask` and `result.transfer_scale` are for `ActConfig`,
        `result.fit_settings` are for `fit`.

    Raises:
        ActTypeError: a base, donor, scores, number or batches of the wrong type; a model with adapters.
        ActValueError: missing or repeated densities or scales, or some out of range; settings that nothing would use;
            scores of a different model; no batch, or a batch without an answer token; the same data for fitting and
            measuring; a donor of a different structure; quantized or offloaded modules; weights that are not finite;
            a model without logits. Then the base is unchanged.

    Warns:
        ActWarning: for scored channels once, as `initialize_from_donor`; once, as `ChannelScores.top`, for the lowest
            density for which it warns.

    Example:
        >>> keep = {"english": batches}
        >>> result = sweep(base, donor, scores, batches, keep, scales=[0.5, 1.0], scope="module", show_progress=False)
        >>> len(result.rows)
        12
        >>> print(result)
        >>> print(sweep(base, donor, None, batches, batches, max_keep_loss=0.03))  # rules of weights
    """
    _check_base(base)
    base = runnable(base)
    donor = runnable(donor) if isinstance(donor, nn.Module) else donor
    plan = make_plan(
        has_scores=scores is not None,
        held_out=(ability_dataloader, keep_dataloader),
        to_fit=(fit_ability_dataloader, fit_keep_dataloader),
        densities=densities,
        scales=scales,
        scope=scope,
        normalize=normalize,
        max_drop=max_drop,
        max_keep_loss=max_keep_loss,
        methods=methods,
        keep_weights=keep_weights,
        ranks=ranks,
    )
    masks = {} if scores is None else _masks(scores, base, plan)
    opened: nn.Module | None = donor if isinstance(donor, nn.Module) else None
    if plan.weight_methods:
        opened = open_models(base, donor, None)[1][0]
    together = all_begin(
        "sweep", [sorted(method.value for method in plan.methods), plan.densities, plan.scales], stacklevel=2
    )
    with evaluation(base, *(() if opened is None else (opened,))):
        data = _read(ability_dataloader, keep_dataloader, together=together)
        moves = None
        if masks:
            moving = [name for name, channels in masks[plan.densities[-1]].items() if channels.numel()]
            origin = None if scores is None else scores.origin
            with donor_for_model(base, donor, moving, origin=origin) as transfer:
                moves = RowMoves(base, transfer, list(masks.values()))
                transfer.warn(stacklevel=2)
        hidden = None if show_progress else True
        with tqdm(total=len(masks) * len(plan.scales), desc="sweep", unit="setting", disable=hidden) as bar:
            first = _measure(base, data)
            start = SweepRow(first.ability, first.keep, 0.0, 0.0, 0, Method.BASE)
            of_donor = _measure(opened, data) if opened is not None and _knows(opened, data) else None

            def measure() -> Measurement:
                return _measure(base, data)

            rows = [] if moves is None else _channel_rows(moves, plan, measure, bar)
            moves = None
            if opened is not None and plan.weight_methods:
                inputs = None
                if plan.fits:
                    inputs = CollectedInputs(
                        base,
                        opened,
                        _joined(fit_ability_dataloader, "fit_ability_dataloader"),
                        _joined(fit_keep_dataloader, "fit_keep_dataloader"),
                        show_progress=show_progress,
                    )
                rows += _other_rows(base, opened, plan, inputs, measure, start, bar)
    return SweepResult(
        rows=tuple(rows),
        base=start,
        donor=of_donor,
        max_drop=plan.max_drop,
        scope=plan.scope,
        normalize=plan.normalize,
        masks=masks,
        max_keep_loss=plan.max_keep_loss,
    )


def _masks(scores: ChannelScores, base: nn.Module, plan: Plan) -> dict[float, ChannelMask]:
    """Density -> mask."""
    _check_scores(scores, base)
    comparable = scores.num_comparable
    masks = {
        density: select_channels(scores, comparable, density, scope=plan.scope, normalize=plan.normalize).with_origin(
            scores.origin
        )
        for density in plan.densities
    }
    if not masks[plan.densities[0]].num_selected:
        raise ActValueError(
            f"densities: {plan.densities[0]} selects none of {sum(scores.num_channels.values())} channels, expected "
            "at least one"
        )
    if plan.scope is Scope.GLOBAL:
        _warn_of_one_kind(masks, comparable, stacklevel=4)
    return masks


def _warn_of_one_kind(masks: Mapping[float, ChannelMask], comparable: Mapping[str, int], *, stacklevel: int) -> None:
    for density, mask in masks.items():
        text = dominance_text(mask, comparable)
        if text is not None:
            warnings.warn(f"density {density}: {text}", ActWarning, stacklevel=stacklevel)
            return


def _channel_rows(moves: RowMoves, plan: Plan, measure: Callable[[], Measurement], bar: tqdm[None]) -> list[SweepRow]:
    """Scored channels, for every density and scale."""
    rows = []
    with moves:
        for number, scale in _settings(len(plan.densities), plan.scales):
            moves.move_(number, scale)
            found = measure()
            rows.append(SweepRow(found.ability, found.keep, plan.densities[number], scale, moves.num_channels[number]))
            bar.update()
    return sorted(rows, key=lambda row: (row.density, row.transfer_scale))


def _other_rows(
    base: nn.Module,
    donor: nn.Module,
    plan: Plan,
    inputs: CollectedInputs | None,
    measure: Callable[[], Measurement],
    start: SweepRow,
    bar: tqdm[None],
) -> list[SweepRow]:
    """Rules of weights and fits."""
    pairs = find_pairs(base, [donor])
    names = parameters_of(pairs)
    with WholeMoves(base, names) as moves:
        search = Search(moves, pairs, measure, start, bar, max_keep_loss=plan.search_limit)
        search.try_rules(default_rules(plan.methods, scales=plan.scales, num_layers=count_layers(names)))
        search.refine_interpolation()
        if inputs is not None:
            search.try_fits(
                inputs,
                keep_weights=plan.keep_weights,
                methods=plan.methods,
                densities=plan.row_densities,
                ranks=plan.ranks,
            )
    order = list(Method)
    return sorted(search.rows, key=lambda row: (order.index(row.method), *_scale_of(row)))


def _scale_of(row: SweepRow) -> tuple[float, ...]:
    """Fits stay in the order in which they were tried."""
    return (row.transfer_scale,) if row.method is Method.INTERPOLATION else ()


def _joined(data: Skills | None, argument: str) -> list[Mapping[str, Any]]:
    """All batches, of all skills."""
    batches: list[Mapping[str, Any]] = []
    for one in data.values() if isinstance(data, Mapping) else [data]:
        if not isinstance(one, Iterable):
            raise ActTypeError(f"{argument}: got {type(one).__name__}, expected an iterable of batches")
        batches += without_repeats(one)
    if not batches and num_processes() == 1:
        raise ActValueError(
            f"{argument}: got no batch, expected at least one (is the dataset empty, or a generator exhausted?)"
        )
    return batches


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Module):
        raise ActTypeError(f"base: got {type(base).__name__}, expected a torch.nn.Module (load the model first)")
    if isinstance(base, PeftModel) or has_adapters(base):
        raise ActTypeError(
            f"base: got a {type(base).__name__} with adapters in it, expected a plain model (merge them with "
            "merge_and_unload(), or load the model without them)"
        )
    if needs_every_process(base):
        raise ActValueError(
            "base: is spread over processes, expected a model in one piece, whose weights are overwritten for a while "
            "(sweep before FSDP or ZeRO 3 wraps it)"
        )


def _check_scores(scores: ChannelScores, base: nn.Module) -> None:
    if not isinstance(scores, ChannelScores):
        raise ActTypeError(f"scores: got {type(scores).__name__}, expected ChannelScores (from localize)")
    modules = dict(base.named_modules())
    for name, count in scores.num_channels.items():
        module = modules.get(name)
        found = num_channels(module) if module is not None and channel_kind(module) is not None else None
        if module is None or found != count:
            what = "no such module with channels" if found is None else f"{found} channels"
            raise ActValueError(
                f"{name}: the scores have {count} channels, the base has {what}, expected scores of this model"
            )
        if weight_of(module).device.type == "meta":
            raise ActValueError(
                f"{name}: its weight is offloaded (on the meta device), expected it in memory (load the base without "
                "offloading)"
            )


def _read(ability: Dataloader, keep: Skills, *, together: bool) -> _Data:
    skills: Mapping[str, Dataloader] = keep if isinstance(keep, Mapping) else {"keep": keep}
    if not skills:
        raise ActValueError("keep_dataloader: got no skill, expected at least one")
    return (
        HeldOutData(ability, argument="ability_dataloader", together=together),
        {
            name: HeldOutData(batches, argument=f"keep_dataloader {name!r}", together=together)
            for name, batches in skills.items()
        },
    )


def _measure(model: nn.Module, data: _Data) -> Measurement:
    ability, keep = data
    return Measurement(ability.measure(model), {name: batches.measure(model) for name, batches in keep.items()})


def _knows(model: nn.Module, data: _Data) -> bool:
    """Whether all tokens of the data are in the vocabulary of a model."""
    vocabulary = vocabulary_parameters(model)
    sizes = [parameter.shape[0] for name, parameter in model.named_parameters() if name in vocabulary]
    largest = max(batches.largest_token for batches in (data[0], *data[1].values()))
    return all(largest < size for size in sizes)


def _settings(num_densities: int, scales: Sequence[float]) -> Iterator[tuple[int, float]]:
    """Every number of a density with every scale. With a new density the scale stays, so old rows need no change."""
    for number in range(num_densities):
        for scale in scales if number % 2 == 0 else reversed(scales):
            yield number, scale
