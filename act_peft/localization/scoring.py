"""`localize`: two models, a kind of score, one score for every channel."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from act_peft.channels.names import Patterns
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.checks import member_of
from act_peft.errors import ActValueError, ActWarning
from act_peft.localization.activations import score_activations
from act_peft.localization.attribution import POINTS, score_attributions
from act_peft.localization.candidates import find_candidates, unmatched_names
from act_peft.localization.pair import Donor, open_pair
from act_peft.localization.vocabulary import warn_left_out
from act_peft.localization.weights import score_weights


def localize(
    base: nn.Module,
    donor: Donor,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    *,
    score: str | ScoreKind = ScoreKind.ACTIVATION,
    keep_dataloader: Iterable[Mapping[str, Any]] | None = None,
    points: int | None = None,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
    show_progress: bool = True,
) -> ChannelScores:
    """Score every channel by how differently the two models answer.

    Both models read the same tokens. Equation of the paper (arXiv 2601.09398), with a the output of a module and T the
    answer tokens of all batches pooled (sums and counts are added over batches and divided once):

        score_i = (1 / |T|) * sum over t in T of | a_donor[i, t] - a_base[i, t] |

    A token counts where `labels != -100`; without labels where `attention_mask == 1`; without either, always. Padding
    never counts, so batch size, order and padding side do not matter beyond rounding. A module that sees a token more
    than once (a norm over every attention head, a module that is called several times) contributes the mean of these
    observations, so that every token counts once everywhere. Tied modules are two candidates with two outputs.

    `score="weight"` needs no data: the Euclidean norm of the change of everything that belongs to a channel, its row
    of the weight (element of a norm, column of an embedding) and its element of the bias, divided by nothing: a
    channel with more inputs can have a larger norm. The scores have 0 tokens.

        score_i = || theta_donor,i - theta_base,i ||

    `score="attribution"` is to first order how much the loss falls when channel i moves to the donor, averaged over
    points on the straight line between the models: minus the product of gradient and difference on the ability's data
    and, if there are any, minus that product on data to keep, so a channel that harms the skill to keep loses as much
    as its loss there rises. L is the model's own loss on the ability's data (plus that on data to keep), the mean over
    the answer tokens of all batches that have a token before them.

        score_i = mean over alpha of -(dL / d theta_i at theta_base + alpha * (theta_donor - theta_base))
                                     * (theta_donor,i - theta_base,i),    alpha = 0, 1/points, ..., (points - 1)/points

    Only the candidates move along the line, in a copy of their parameters. Such scores may be negative: a channel that
    would do harm. Of tied weights, every use has its own gradient. `a + b` pools the ability's data exactly, and the
    data to keep with the same numbers of tokens, which is exact if both runs kept the same data.

    Models run in evaluation mode and come back exactly as they were: training flags, hooks, gradients, random numbers;
    also after an exception or Ctrl-C. They may differ in device and dtype: the difference is taken in float32 or
    wider, the sum in float64. Memory beyond the models and their forward passes: for activations the base's outputs at
    the answer tokens of one batch, for attributions a copy of the candidates' parameters and one module's gradient.

    An adapter is a donor too, and needs no second model in memory: the base runs with the adapter off and on. The
    module names are those of the model without PEFT. For scores by weights and attributions the adapter is merged into
    a copy of the weights that it changes.

    If one model knows more tokens than the other, only the rows of the output layer that both have are compared; the
    others have the score 0 and are never selected.

    Args:
        base: the model that will receive the ability, any `torch.nn.Module` that accepts the batches. A PEFT model
            counts with its active adapters.
        donor: its relative that has the ability, of the same structure; a PEFT model whose base model is `base`, or
            `base` itself if that is a PEFT model: then the base is the model with its adapters off; or the folder or
            Hub id of a PEFT adapter for `base`.
        dataloader: any iterable of batches. A batch is a dict (or `BatchEncoding`) of what the models accept, with
            `input_ids` or `inputs_embeds` of shape `[B, T]` or `[B, T, C]`; only attributions pass `labels` on. Packed
            batches without an attention mask work. Not for scores by weights.
        score: `"activation"` (the paper), `"weight"` or `"attribution"`.
        keep_dataloader: for attributions, batches of a skill to keep.
        points: for attributions, how many points of the line are averaged (4).
        target_modules: as in PEFT, which modules are candidates: a regular expression for the whole name, names or
            dotted suffixes, or `"all-linear"`. Default: every linear, Conv1D, embedding and norm module.
        exclude_modules: as in PEFT, modules to leave out: a regular expression for the whole name, names or dotted
            suffixes.
        show_progress: show a progress bar if the error stream is a terminal.

    Returns:
        Module name -> score, float64 `[C]`, for every candidate in the base's order.

    Raises:
        ActTypeError: a model that is no module, a batch that is no dict of tensors.
        ActValueError: an unknown score, a setting that this score does not use, or data missing; an adapter that
            cannot be loaded or switched off; the models differ in structure (found before anything runs), no candidate
            is left, no batch, a batch without an answer token or with one that only one model knows; activations,
            gradients or weights that are not finite; by activations, a module whose output has no row for every token
            (experts, encoders of other inputs) or that does not run; by attributions, a model without a loss.

    Warns:
        ActWarning: if the models know different numbers of tokens; if all scores are 0; for a name to select or leave
            out modules by that matches none.
    """
    kind = member_of(ScoreKind, score, "score")
    _check_settings(kind, dataloader=dataloader, keep_dataloader=keep_dataloader, points=points)
    base, donor = open_pair(base, donor, merged=kind is not ScoreKind.ACTIVATION)
    candidates = find_candidates(base, donor, target_modules=target_modules, exclude_modules=exclude_modules)
    warn_left_out(candidates, stacklevel=2)
    for argument, patterns in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        unmatched = unmatched_names(base, patterns)
        if unmatched:
            warnings.warn(f"{argument}: {unmatched} match no module that has channels", ActWarning, stacklevel=2)
    if dataloader is None:
        scores = score_weights(candidates)
    elif kind is ScoreKind.ACTIVATION:
        scores = score_activations(base, donor, candidates, dataloader, show_progress=show_progress)
    else:
        scores = score_attributions(
            base,
            donor,
            candidates,
            dataloader,
            keep_dataloader=keep_dataloader,
            points=POINTS if points is None else points,
            show_progress=show_progress,
        )
    if not any(bool(values.any()) for values in scores.values()):
        warnings.warn("all scores are 0: donor and base are alike (is one given as both?)", ActWarning, stacklevel=2)
    return scores


def _check_settings(kind: ScoreKind, *, dataloader: object, keep_dataloader: object, points: object) -> None:
    """Refuse what is missing, and what would be ignored."""
    if kind is ScoreKind.WEIGHT and dataloader is not None:
        raise ActValueError(
            "dataloader: got one with score='weight', expected none (weights are compared without data)"
        )
    if kind is not ScoreKind.WEIGHT and dataloader is None:
        raise ActValueError(f"dataloader: got None, expected batches (score={kind.value!r} needs examples)")
    for name, value in (("keep_dataloader", keep_dataloader), ("points", points)):
        if value is not None and kind is not ScoreKind.ATTRIBUTION:
            raise ActValueError(
                f"{name}: got one with score={kind.value!r}, expected none (only score='attribution' uses it)"
            )
