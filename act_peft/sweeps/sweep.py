"""`sweep`: measure densities and transfer scales on held-out data, without training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from tqdm import tqdm

from act_peft.batches.evaluation import evaluation
from act_peft.channels.kinds import channel_kind, num_channels, weight_of
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Normalization, Scope, dominance_text, select_channels
from act_peft.checks import ascending, finite_number, member_of
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.peft_modules import has_adapters
from act_peft.sweeps.heldout import HeldOutData
from act_peft.sweeps.result import Measurement, SweepResult, SweepRow
from act_peft.transfer.in_model import donor_for_model
from act_peft.transfer.in_place import RowMoves
from act_peft.transfer.parameters import vocabulary_parameters

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)

Dataloader = Iterable[Mapping[str, Any]]


def sweep(
    base: nn.Module,
    donor: nn.Module | str | os.PathLike[str],
    scores: ChannelScores,
    ability_dataloader: Dataloader,
    keep_dataloader: Dataloader | Mapping[str, Dataloader],
    *,
    densities: Sequence[float] = DENSITIES,
    scales: Sequence[float] = SCALES,
    scope: str | Scope = Scope.GLOBAL,
    normalize: str | Normalization = Normalization.NONE,
    max_drop: float = 0.05,
    show_progress: bool = True,
) -> SweepResult:
    """Measure the base after a transfer of the donor's channels, for every density and transfer scale.

        W_base[i, :] + λ * (W_donor[i, :] - W_base[i, :])          for the channels i of `scores.top(density)`

    (arXiv 2601.09398, the transfer step.) Every setting gets its loss and token accuracy on held-out data of the
    ability and of the skills to keep. Nothing is trained and no model is built: rows of the base are overwritten in
    place, and only those that change from one setting to the next. At the end, also after an exception or Ctrl-C, the
    base has its original bytes again. The time is one forward pass over the data per setting, one for the base
    itself, one for a donor in memory, and the time for copying rows.

    Loss and accuracy count the answer tokens of all batches: with labels those with `labels != -100`, shifted as in
    causal language models; without labels, every unmasked token. The first token of a sample never counts.

    The recommendation is the setting with the highest token accuracy on the ability, among the settings that raise it
    above the base's accuracy and cost no skill to keep more than `max_drop`; among equals the lower density, then the
    lower transfer scale. There may be no such setting. The Pareto front compares the accuracy on the ability and the
    mean accuracy on the skills to keep. It includes the base if no setting beats it.

    Modules that share a weight (tied embeddings) get separate weights until the end, as with an adapter: rows of the
    output layer do not change the embedding.

    Memory beyond the models: originals and differences of the rows of the largest density, in the base's dtype and on
    its device (twice that share of the candidates' weights); a copy of each tied weight that changes; the batches,
    which are read once and stay on their device. In a base of 16 bits the differences are rounded to 16 bits, so the
    last bit of a row can differ from that of an adapter with float32 deltas.

    Args:
        base: the model that receives the ability, without adapters. It runs in evaluation mode.
        donor: a related model with the ability: a model in memory, or the folder or Hub id of a checkpoint or of a
            LoRA or ACT adapter of the base. On disk only the rows of the largest density are read.
        scores: scores of the channels, from `localize`.
        ability_dataloader: batches of held-out examples of the ability: dicts that the models accept.
        keep_dataloader: batches of a skill to keep; for several skills, a dict skill -> batches.
        densities: shares of the channels, above 0 and at most 1.
        scales: transfer scales λ, finite and not 0.
        scope: as in `ChannelScores.top`.
        normalize: as in `ChannelScores.top`.
        max_drop: greatest allowed loss of accuracy on a skill to keep, as a share (0.05 is 5 points).
        show_progress: show a progress bar if the error stream is a terminal.

    Returns:
        The table. `print(result)` shows it; `result.mask` and `result.transfer_scale` are for `ActConfig`.

    Raises:
        ActTypeError: a base, donor, scores, number or batches of the wrong type; a model with adapters.
        ActValueError: missing or repeated densities or scales, or some out of range; scores of a different model; no
            batch, or a batch without an answer token; a donor of a different structure; quantized or offloaded
            modules; weights that are not finite; a model without logits. Then the base is unchanged.

    Warns:
        ActWarning: once, as `initialize_from_donor`; once, as `ChannelScores.top`, for the lowest density for which it
            warns.

    Example:
        >>> keep = {"english": batches}
        >>> result = sweep(base, donor, scores, batches, keep, scales=[0.5, 1.0], scope="module", show_progress=False)
        >>> len(result.rows)
        12
        >>> print(result)
    """
    scope, normalize = member_of(Scope, scope, "scope"), member_of(Normalization, normalize, "normalize")
    _check_base(base)
    _check_scores(scores, base)
    scales = ascending(scales, "scales", nonzero=True)
    densities = ascending(densities, "densities", above=0, most=1)
    max_drop = finite_number(max_drop, "max_drop", least=0)
    comparable = scores.num_comparable
    masks = {
        density: select_channels(scores, comparable, density, scope=scope, normalize=normalize)
        for density in densities
    }
    if not masks[densities[0]].num_selected:
        raise ActValueError(
            f"densities: {densities[0]} selects none of {sum(scores.num_channels.values())} channels, expected at "
            "least one"
        )
    if scope is Scope.GLOBAL:
        _warn_of_one_kind(masks, comparable, stacklevel=3)
    moving = [name for name, channels in masks[densities[-1]].items() if channels.numel()]
    with evaluation(base, *((donor,) if isinstance(donor, nn.Module) else ())):
        data = _read(ability_dataloader, keep_dataloader)
        with donor_for_model(base, donor, moving) as transfer:
            moves = RowMoves(base, transfer, list(masks.values()))
            transfer.warn(stacklevel=2)
        num_settings = len(densities) * len(scales)
        with tqdm(total=num_settings, desc="sweep", unit="setting", disable=None if show_progress else True) as bar:
            start = _measure(base, data)
            of_donor = _measure(donor, data) if isinstance(donor, nn.Module) and _knows(donor, data) else None
            rows = []
            with moves:
                for number, scale in _settings(len(densities), scales):
                    moves.move_(number, scale)
                    result = _measure(base, data)
                    rows.append(
                        SweepRow(result.ability, result.keep, densities[number], scale, moves.num_channels[number])
                    )
                    bar.update()
    return SweepResult(
        rows=tuple(sorted(rows, key=lambda row: (row.density, row.transfer_scale))),
        base=SweepRow(start.ability, start.keep, 0.0, 0.0, 0),
        donor=of_donor,
        max_drop=max_drop,
        scope=scope,
        normalize=normalize,
        masks=masks,
    )


def _warn_of_one_kind(masks: Mapping[float, ChannelMask], comparable: Mapping[str, int], *, stacklevel: int) -> None:
    for density, mask in masks.items():
        text = dominance_text(mask, comparable)
        if text is not None:
            warnings.warn(f"density {density}: {text}", ActWarning, stacklevel=stacklevel)
            return


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Module):
        raise ActTypeError(f"base: got {type(base).__name__}, expected a torch.nn.Module (load the model first)")
    if isinstance(base, PeftModel) or has_adapters(base):
        raise ActTypeError(
            f"base: got a {type(base).__name__} with adapters in it, expected a plain model (merge them with "
            "merge_and_unload(), or load the model without them)"
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


def _read(
    ability: Dataloader, keep: Dataloader | Mapping[str, Dataloader]
) -> tuple[HeldOutData, dict[str, HeldOutData]]:
    skills: Mapping[str, Dataloader] = keep if isinstance(keep, Mapping) else {"keep": keep}
    if not skills:
        raise ActValueError("keep_dataloader: got no skill, expected at least one")
    return (
        HeldOutData(ability, argument="ability_dataloader"),
        {name: HeldOutData(batches, argument=f"keep_dataloader {name!r}") for name, batches in skills.items()},
    )


def _measure(model: nn.Module, data: tuple[HeldOutData, dict[str, HeldOutData]]) -> Measurement:
    ability, keep = data
    return Measurement(ability.measure(model), {name: batches.measure(model) for name, batches in keep.items()})


def _knows(model: nn.Module, data: tuple[HeldOutData, dict[str, HeldOutData]]) -> bool:
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
