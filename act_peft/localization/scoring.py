"""`localize`: one score for every channel, from two models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast, overload

from torch import nn

from act_peft.channels.names import Patterns
from act_peft.channels.origin import Origin
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.checks import member_of
from act_peft.errors import ActValueError, ActWarning
from act_peft.localization.activations import score_activations, score_contrasts
from act_peft.localization.attribution import POINTS, score_attributions
from act_peft.localization.candidates import Candidates, find_candidates, unmatched_names
from act_peft.localization.groups import ONLY, Group, Groups, group_to_keep, groups_of
from act_peft.localization.pair import Donor, base_record, donor_record, open_pair, origin_of_pair
from act_peft.localization.settings import Run, make_run
from act_peft.localization.spool import Model, Spool, load, release
from act_peft.localization.spread import check_spread
from act_peft.localization.vocabulary import CommonVocabulary, warn_left_out
from act_peft.localization.weights import score_weights
from act_peft.processes import all_begin
from act_peft.shards import unflattened

Dataloader = Iterable[Mapping[str, Any]]


@overload
def localize(
    base: Model,
    donor: Donor | Model,
    dataloader: Mapping[str, Dataloader],
    *,
    score: str | ScoreKind = ...,
    keep_dataloader: Dataloader | None = ...,
    points: int | None = ...,
    target_modules: Patterns = ...,
    exclude_modules: Patterns = ...,
    max_tokens: int | None = ...,
    max_memory: int | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    every: int | None = ...,
    spool: str | os.PathLike[str] | None = ...,
    show_progress: bool = ...,
) -> dict[str, ChannelScores]: ...
@overload
def localize(
    base: Model,
    donor: Donor | Model,
    dataloader: Dataloader | None = ...,
    *,
    score: str | ScoreKind = ...,
    keep_dataloader: Dataloader | None = ...,
    points: int | None = ...,
    target_modules: Patterns = ...,
    exclude_modules: Patterns = ...,
    max_tokens: int | None = ...,
    max_memory: int | None = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    every: int | None = ...,
    spool: str | os.PathLike[str] | None = ...,
    show_progress: bool = ...,
) -> ChannelScores: ...
def localize(
    base: Model,
    donor: Donor | Model,
    dataloader: Dataloader | Mapping[str, Dataloader] | None = None,
    *,
    score: str | ScoreKind = ScoreKind.ACTIVATION,
    keep_dataloader: Dataloader | None = None,
    points: int | None = None,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
    max_tokens: int | None = None,
    max_memory: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    spool: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> ChannelScores | dict[str, ChannelScores]:
    """Score every channel by the difference between two related models.

    With a the output of a module and T the answer tokens of all batches (arXiv 2601.09398):

        "activation"   score_i = (1 / |T|) * sum over t in T of | a_donor[i, t] - a_base[i, t] |
        "weight"       score_i = || theta_donor,i - theta_base,i ||              over all parameters of channel i
        "attribution"  score_i = -dL/dtheta_i * (theta_donor,i - theta_base,i)   averaged between the models
        "contrast"     score_i = A_i / max(K_i, 0.1 * mean of K)                 no labels needed

    For the contrast, A_i is the activation score on the ability, K_i the same on the data to keep. The mean of K is
    over the channels of the module. It keeps the divisor away from 0.

    The answer tokens are those with `labels != -100`; without labels, all unmasked tokens. Both models run in
    evaluation mode and are not changed. An adapter as donor needs no second model in memory. If the vocabularies
    differ, only common tokens are compared. `act_peft/README.md` has the details.

    In a distributed run (torchrun, `accelerate launch`) all processes call this at the same time, each with its own
    part of the batches, as a Trainer's `get_train_dataloader()` gives them there. All of them get the scores of all
    batches; samples that such a dataloader repeats count once. Models inside DistributedDataParallel, FSDP and
    `torch.compile` keep the names of their modules.

    Args:
        base: the model that will receive the ability, any `torch.nn.Module` that accepts the batches. A PEFT model
            runs with its active adapters.
        donor: a related model of the same structure that has the ability; or a PEFT model on top of `base`; or `base`
            itself if it is a PEFT model (the base is then the model with its adapters off); or the folder or Hub id
            of a PEFT adapter for `base`.
        dataloader: batches for the models: dicts with `input_ids` `[B, T]` or `inputs_embeds` `[B, T, C]`. Or a dict
            of such dataloaders by name, for example of domains or languages. Not for scores by weights.
        score: `"activation"` (the paper), `"weight"`, `"attribution"` or `"contrast"`.
        keep_dataloader: batches of a skill to keep; needed for contrasts, possible for attributions. A channel that
            harms it gets a lower score.
        points: for attributions, number of points between the models (4).
        target_modules: candidate modules as in PEFT: a regular expression for the whole name, names or dotted
            suffixes, or `"all-linear"`. Default: every linear, Conv1D and norm module, without the output layer and
            embeddings (`nn.Embedding`: tokens, positions). Name these to get them too; `".*"` takes every module, as
            the paper does. Which module is the output layer, the model's `get_output_embeddings` says; without this
            method it is a linear module that shares its weight with an embedding, or the last one if it has a channel
            for every row of the first embedding.
        exclude_modules: modules to leave out: a regular expression for the whole name, names or dotted suffixes.
        max_tokens: for activations and contrasts, the greatest number of answer tokens of a sample that count, evenly
            spread over them; by default all of them.
        max_memory: for activations and contrasts, about how many bytes the outputs of the base may take that wait for
            the donor's (1 GiB). Within a large batch the two models take turns; models that share modules (adapters)
            and those that are spread over processes run again for every part of the tokens.
        checkpoint: file of running sums, itself a `ChannelScores` of the batches so far. If it exists, the run goes on
            from there, with the same models, settings and batches. Data to keep have a file `CHECKPOINT.keep`, each of
            a dict of dataloaders one by its number from 0 (`CHECKPOINT.group-0`); in a distributed run every process
            has files of its own (`CHECKPOINT.0-of-2`), which add up with `+`.
        every: number of batches after which it is written (50).
        spool: for activations and contrasts, a folder for two models that do not fit into memory together. `base` and
            `donor` may then be functions that load them: the base runs first and its outputs at the answer tokens are
            written there, then the donor runs. Limit them with `max_tokens`.
        show_progress: show a progress bar if the error stream is a terminal.

    Returns:
        Module name -> score, float64 `[C]`, for every candidate in the base's order. For a dict of dataloaders, a
        dict of scores with the same names.

    Raises:
        ActTypeError: a model, batch or number of points of the wrong type.
        ActValueError: settings or data that do not fit the score; models of different structure; an adapter that
            cannot be loaded or switched off; a replaced `forward` where modules must be copied (attributions, adapters
            in folders, merging); no candidate, no batch, no answer token; values that are not finite; a candidate that
            does not run, or without one output row per token; for attributions, a model without a loss.

    Warns:
        ActWarning: the vocabularies differ; all scores are 0; an entry of `target_modules` or `exclude_modules`
            matches no module; not all processes of a distributed run came, so that the scores are those of one.

    Example:
        >>> scores = localize(base, donor, batches, show_progress=False)
        >>> mask = scores.top(0.2, scope="module")
        >>> mask.save("mask.safetensors")
    """
    kind = member_of(ScoreKind, score, "score")
    _check_settings(kind, dataloader=dataloader, keep_dataloader=keep_dataloader, points=points)
    run = make_run(
        kind,
        max_tokens=max_tokens,
        max_memory=max_memory,
        checkpoint=checkpoint,
        every=every,
        spool=spool,
        show_progress=show_progress,
    )
    patterns = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    groups, keep = groups_of(dataloader), group_to_keep(keep_dataloader)
    if spool is not None and dataloader is not None:
        found = _score_in_turn(kind, base, donor, groups, keep, run, patterns, spool)
    else:
        found = _score_together(
            kind, cast(nn.Module, base), cast(Donor, donor), groups, keep, run, patterns, points=points
        )
    if not any(bool(values.any()) for scores in found.values() for values in scores.values()):
        warnings.warn(
            "all scores are 0: donor and base are equal (is it the same model twice?)", ActWarning, stacklevel=2
        )
    return found[ONLY] if list(found) == [ONLY] else found


def _score_together(
    kind: ScoreKind,
    base: nn.Module,
    donor: Donor,
    groups: Groups,
    keep: Group | None,
    run: Run,
    patterns: Mapping[str, Patterns],
    *,
    points: int | None,
) -> dict[str, ChannelScores]:
    """Scores of two models in memory."""
    given = (base, donor)
    base, donor = open_pair(base, donor, merged=kind not in (ScoreKind.ACTIVATION, ScoreKind.CONTRAST))
    candidates = _find(base, donor, kind, patterns)
    if kind is not ScoreKind.WEIGHT:
        run = replace(run, together=_all_begin(kind, candidates, groups))
    if kind is ScoreKind.WEIGHT:
        found = {ONLY: score_weights(candidates)}
    elif kind is ScoreKind.ACTIVATION:
        found = score_activations(base, donor, candidates, groups, run)
    elif kind is ScoreKind.CONTRAST and keep is not None:
        found = score_contrasts(base, donor, candidates, groups, run, keep=keep)
    else:
        points = POINTS if points is None else points
        found = score_attributions(base, donor, candidates, groups, run, keep=keep, points=points)
    with unflattened(base, donor):
        origin = origin_of_pair(*given, candidates.num_channels)
    return {name: scores.with_origin(origin) for name, scores in found.items()}


def _score_in_turn(
    kind: ScoreKind,
    base: Model,
    donor: Any,
    groups: Groups,
    keep: Group | None,
    run: Run,
    patterns: Mapping[str, Patterns],
    folder: str | os.PathLike[str],
) -> dict[str, ChannelScores]:
    """Scores of two models of which only one is in memory."""
    first = load(base, "base")
    own = _find(first, first, kind, patterns)
    run = replace(run, together=_all_begin(kind, own, groups))
    with Spool(folder, [*groups.values(), *([] if keep is None else [keep])], run) as outputs:
        outputs.write(first, own)
        with unflattened(first):
            of_base = base_record(first, own.num_channels)
        release(base, first)
        second = load(donor, "donor")
        candidates = _find(first, second, kind, patterns, warn=False)
        with unflattened(second):
            origin = Origin(of_base, donor_record(second, own.num_channels))
        totals = outputs.differences(second, candidates, CommonVocabulary(first, second))
    kept = None if keep is None else totals[-1].scores(spread=False)
    found = zip(groups, totals, strict=False)  # the last one may be that of the data to keep
    return {name: sums.scores(keep=kept).with_origin(origin) for name, sums in found}


def _find(
    base: nn.Module, donor: nn.Module, kind: ScoreKind, patterns: Mapping[str, Patterns], *, warn: bool = True
) -> Candidates:
    """The compared modules, with a warning for names that match none."""
    check_spread(base, donor, kind)
    with unflattened(base, donor):
        candidates = find_candidates(base, donor, **patterns)
        warn_left_out(candidates, stacklevel=4)
        for argument, names in patterns.items():
            unmatched = unmatched_names(base, names) if warn else []
            if unmatched:
                warnings.warn(f"{argument}: {unmatched} match no module that has channels", ActWarning, stacklevel=4)
    return candidates


def _all_begin(kind: ScoreKind, candidates: Candidates, groups: Groups) -> bool:
    settings = [f"score={kind.value!r}", candidates.summary(), *(group.argument for group in groups.values())]
    return all_begin("localize", settings, stacklevel=4)


def _check_settings(kind: ScoreKind, *, dataloader: object, keep_dataloader: object, points: object) -> None:
    """Refuse missing arguments, and arguments that the score would ignore."""
    if kind is ScoreKind.GAIN:
        raise ActValueError("score: got 'gain', expected another kind (gains come from fit: fit(...).gains)")
    if kind is ScoreKind.WEIGHT and dataloader is not None:
        raise ActValueError(
            "dataloader: got one with score='weight', expected none (weights are compared without data)"
        )
    if kind is not ScoreKind.WEIGHT and dataloader is None:
        raise ActValueError(f"dataloader: got None, expected batches (score={kind.value!r} needs examples)")
    if kind is ScoreKind.CONTRAST and keep_dataloader is None:
        raise ActValueError("keep_dataloader: got None, expected batches (score='contrast' divides by them)")
    if keep_dataloader is not None and kind not in (ScoreKind.ATTRIBUTION, ScoreKind.CONTRAST):
        raise ActValueError(
            f"keep_dataloader: got one with score={kind.value!r}, expected none (only score='attribution' and "
            "score='contrast' use it)"
        )
    if points is not None and kind is not ScoreKind.ATTRIBUTION:
        raise ActValueError(
            f"points: got one with score={kind.value!r}, expected none (only score='attribution' uses it)"
        )
