"""The loop over batches: run both models on the same tokens and sum up where their outputs differ."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from act_peft.errors import ActError, ActValueError
from act_peft.localize.answer_tokens import find_answer_tokens
from act_peft.localize.candidates import find_candidates
from act_peft.localize.comparison import BatchComparison
from act_peft.localize.state import evaluation
from act_peft.localize.sums import ChannelSums
from act_peft.names import Patterns
from act_peft.scores import ChannelScores

# Only the loss needs these, and the loss is not needed.
_LOSS_KEYS = frozenset({"labels", "num_items_in_batch"})


def localize(
    base: nn.Module,
    donor: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
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

    Both models run in evaluation mode without gradients and come back exactly as they were: training flags, hooks,
    gradients, random numbers; also after an exception or Ctrl-C. They may differ in device and dtype: the difference
    is taken in float32 or wider, the sum in float64. Beyond the two forward passes it needs memory for the base's
    outputs at the answer tokens of one batch.

    Args:
        base: the model that will receive the ability, any `torch.nn.Module` that accepts the batches.
        donor: its relative that has the ability, of the same structure.
        dataloader: any iterable of batches. A batch is a dict (or `BatchEncoding`) of what the models accept, with
            `input_ids` or `inputs_embeds` of shape `[B, T]` or `[B, T, C]`; `labels` are not passed on. Packed batches
            without an attention mask work.
        target_modules: as in PEFT, which modules are candidates: a regular expression for the whole name, names or
            dotted suffixes, or `"all-linear"`. Default: every linear, Conv1D, embedding and norm module.
        exclude_modules: as in PEFT, modules to leave out: a regular expression for the whole name, names or dotted
            suffixes.
        show_progress: show a progress bar if the error stream is a terminal.

    Returns:
        Module name -> mean absolute difference, float64 `[C]`, for every candidate in the base's order.

    Raises:
        ActTypeError: a model that is no module, a batch that is no dict of tensors.
        ActValueError: the models differ in structure (found before anything runs), no candidate is left, no batch, a
            batch without an answer token, a module whose output has no row for every token (experts, encoders of
            other inputs) or that does not run, activations that are not finite.
    """
    candidates = find_candidates(base, donor, target_modules=target_modules, exclude_modules=exclude_modules)
    totals = ChannelSums(candidates.num_channels)
    with (
        evaluation(base, donor),
        tqdm(dataloader, desc="localize", unit="batch", disable=None if show_progress else True) as batches,
    ):
        for number, batch in enumerate(batches):
            try:
                tokens = find_answer_tokens(batch)
                comparison = BatchComparison(candidates, tokens)
                with comparison.reading_base():
                    _run(base, batch)
                with comparison.reading_donor():
                    _run(donor, batch)
                totals.add_(comparison.sums(), len(tokens))
            except ActError as error:
                raise type(error)(f"batch {number}: {error}") from error
    if totals.num_tokens == 0:
        raise ActValueError(
            "dataloader: got no batch, expected at least one (is the dataset empty, or a generator already used up?)"
        )
    return ChannelScores(totals.sums, totals.num_tokens)


def _run(model: nn.Module, batch: Mapping[str, Any]) -> None:
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in _LOSS_KEYS
    }
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs.setdefault("use_cache", False)
    model(**inputs)
