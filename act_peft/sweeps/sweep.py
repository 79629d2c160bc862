"""`sweep`: which density and which transfer scale, seen on held-out data without training anything."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm

from act_peft.batches.evaluation import evaluation
from act_peft.channels.kinds import channel_kind, num_channels, weight_of
from act_peft.channels.scores import ChannelScores, Normalization, Scope
from act_peft.checks import ascending, finite_number, member_of
from act_peft.errors import ActTypeError, ActValueError
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
    """Measure the base with the donor's channels moved over, for every density and transfer scale.

        W_base[i, :] + λ * (W_donor[i, :] - W_base[i, :])          for the channels i of `scores.top(density)`

    (arXiv 2601.09398, the transfer step.) For every setting the loss and the token accuracy on held-out data of the
    ability and of the skills to keep. Nothing is trained, loaded again or built: rows of the base are overwritten in
    place, and only those that change from one setting to the next. At the end, also after an exception or Ctrl-C, the
    base has its bytes back. Beside one forward pass of the base over the data for every setting, one for the base
    itself and one of a donor in memory, the time is that of copying rows.

    Loss and accuracy count the answer tokens, pooled over all batches: `labels != -100`, shifted as causal language
    models do; without labels every token that `attention_mask` has; in either case those with a token before them.

    The recommendation is the setting with the highest token accuracy on the ability among those that raise it above
    the base's and whose accuracy on no skill to keep is more than `max_drop` below the base's; among equals the lower
    density, then the lower scale. There may be none. The Pareto front is over the accuracy on the ability and the
    mean accuracy on the skills to keep, and includes the base where no setting beats it.

    Modules that share a weight (tied embeddings) move apart as they do with an adapter: each has a weight of its own
    until the end, and the rows of the output layer do not move the embedding.

    Memory beyond the models: originals and differences of the rows of the largest density, in the base's dtype and on
    its device, so twice that share of the candidates' weights; tied weights that move once more; the batches, which
    are read once and kept where they are. In a base of 16 bits the differences are rounded to it, so a row can differ
    from that of an adapter with float32 deltas in its last bit.

    Args:
        base: the model that receives the ability, without adapters. It runs in evaluation mode.
        donor: its relative: a model in memory, or the folder or Hub id of a checkpoint or of a LoRA or ACT adapter of
            the base, of which only the rows of the largest density are read.
        scores: of the channels, from `localize`.
        ability_dataloader: batches of held-out examples of the ability: dicts that the models accept.
        keep_dataloader: the same of a skill to keep, or skill -> batches for several.
        densities: shares of the channels, above 0 and at most 1.
        scales: transfer scales λ, finite and not 0.
        scope: as in `ChannelScores.top`.
        normalize: as in `ChannelScores.top`.
        max_drop: how much accuracy a skill to keep may lose at most, as a share (0.05 is 5 points).
        show_progress: show a progress bar if the error stream is a terminal.

    Returns:
        The table; `result.mask` and `result.transfer_scale` go into `ActConfig`, `print(result)` shows it.

    Raises:
        ActTypeError: a base, donor, scores or batches of a kind that does not fit; a model with adapters.
        ActValueError: no or repeated densities or scales, or ones out of range; scores of another model; no batch, or
            one without an answer token; a donor of another structure; quantised or offloaded modules; weights that are
            not finite; a model without logits. The base is unchanged then.

    Warns:
        ActWarning: once, as `initialize_from_donor`.
    """
    scope, normalize = member_of(Scope, scope, "scope"), member_of(Normalization, normalize, "normalize")
    _check_base(base)
    _check_scores(scores, base)
    scales = ascending(scales, "scales", nonzero=True)
    densities = ascending(densities, "densities", above=0, most=1)
    max_drop = finite_number(max_drop, "max_drop", least=0)
    masks = {density: scores.top(density, scope=scope, normalize=normalize) for density in densities}
    if not masks[densities[0]].num_selected:
        raise ActValueError(
            f"densities: {densities[0]} selects none of {sum(scores.num_channels.values())} channels, expected at "
            "least one"
        )
    moving = [name for name, channels in masks[densities[-1]].items() if channels.numel()]
    with evaluation(base, *((donor,) if isinstance(donor, nn.Module) else ())):
        data = _read(ability_dataloader, keep_dataloader)
        with donor_for_model(base, donor, moving) as transfer:
            moves = RowMoves(base, transfer, list(masks.values()))
            transfer.warn(stacklevel=2)
        num_settings = len(densities) * len(scales)
        with tqdm(total=num_settings, desc="sweep", unit="setting", disable=None if show_progress else True) as bar:
            start = _measure(base, data)
            own = _measure(donor, data) if isinstance(donor, nn.Module) and _knows(donor, data) else None
            rows = []
            with moves:
                for number, scale in _settings(len(densities), scales):
                    moves.move_(number, scale)
                    found = _measure(base, data)
                    rows.append(
                        SweepRow(found.ability, found.keep, densities[number], scale, moves.num_channels[number])
                    )
                    bar.update()
    return SweepResult(
        rows=tuple(sorted(rows, key=lambda row: (row.density, row.transfer_scale))),
        base=SweepRow(start.ability, start.keep, 0.0, 0.0, 0),
        donor=own,
        max_drop=max_drop,
        scope=scope,
        normalize=normalize,
        masks=masks,
    )


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Module):
        raise ActTypeError(f"base: got {type(base).__name__}, expected a torch.nn.Module (load the model first)")
    if isinstance(base, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
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
    """Every number of a density with every scale, so that with a new density the scale stays and old rows with it."""
    for number in range(num_densities):
        for scale in scales if number % 2 == 0 else reversed(scales):
            yield number, scale
