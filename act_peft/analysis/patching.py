"""Sufficiency and necessity: what happens if some channels answer like those of the other model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from act_peft.analysis.patched import PatchedRow, Patching
from act_peft.batches.answer_tokens import AnswerTokens, find_answer_tokens
from act_peft.batches.evaluation import evaluation
from act_peft.batches.predictions import Predictions
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Normalization, Scope, select_channels
from act_peft.checks import ascending, member_of, whole_number
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.localization.candidates import Candidates, find_candidates
from act_peft.localization.comparison import locate_rows, select_rows, tap_outputs
from act_peft.localization.pair import Donor, open_pair
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.sweeps.heldout import HeldOutData, SkillResult, TokenResults, token_results

DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
SELECTED, RANDOM = "selected", "random"


class Positions(Enum):
    """Where activations are exchanged.

    ANSWER: where the answer tokens are predicted, one position before each (in an encoder-decoder, at its own). ALL:
    at every position that is not padding, so also where the prompt is read.
    """

    ANSWER = "answer"
    ALL = "all"


def patch_channels(
    base: nn.Module,
    donor: Donor,
    dataloader: Iterable[Mapping[str, Any]],
    selection: ChannelScores | ChannelMask | Mapping[str, ChannelMask],
    *,
    densities: Iterable[float] | None = None,
    scope: str | Scope = Scope.MODULE,
    normalize: str | Normalization = Normalization.NONE,
    random_draws: int = 1,
    positions: str | Positions = Positions.ANSWER,
    seed: int = 0,
    show_progress: bool = True,
) -> Patching:
    """Exchange the activations of selected channels between the models, and measure the loss on the ability.

    Our definition, because the paper's is not public. With L the loss on the answer tokens:

        sufficiency = (L(base) - L(base with the donor's activations)) / (L(base) - L(donor))
        necessity   = (L(donor with the base's activations) - L(donor)) / (L(base) - L(donor))

    Both are shares of the gap between the models: 1 if the channels carry the whole ability, 0 if none of it. They may
    be below 0 or above 1. The same is measured for random channels, as many of every module. Each mask takes one
    forward pass of each model over the data, and both models run once as they are.

    Args:
        base: as in `localize`.
        donor: as in `localize`.
        dataloader: batches of the ability, not those that the channels were selected on.
        selection: scores, from which masks of growing density are selected; or a mask, or several by name.
        densities: for scores, the densities (0.01, 0.05, 0.1, 0.2, 0.5), above 0.
        scope: for scores, as in `ChannelScores.top`.
        normalize: for scores, as there.
        random_draws: number of random masks for each mask, from 0.
        positions: `"answer"`: activations are exchanged where the answer tokens are predicted; `"all"`: everywhere
            but on padding.
        seed: seed of the random masks.
        show_progress: show a progress bar if the error stream is a terminal.

    Returns:
        One row for each mask and each of its random draws.

    Raises:
        ActTypeError, ActValueError: as `localize`; no mask, or one for other modules or numbers of channels; densities
            for masks; an unknown setting.

    Warns:
        ActWarning: the donor's loss is not below the base's, so there is no gap to close.

    Example:
        >>> from act_peft.analysis import patch_channels
        >>> print(patch_channels(base, donor, batches, scores, densities=[0.1, 1], show_progress=False))
    """
    positions = member_of(Positions, positions, "positions")
    draws = whole_number(random_draws, "random_draws", least=0)
    generator = torch.Generator().manual_seed(whole_number(seed, "seed", least=0))
    masks = _masks(selection, densities, scope, normalize)
    base, donor = open_pair(base, donor, merged=False)
    masks, candidates = _in_models(base, donor, masks)
    planned: list[tuple[str, str, ChannelMask]] = []
    for name, mask in masks.items():
        planned.append((name, SELECTED, mask))
        planned += [(name, RANDOM, _random_like(mask, candidates, generator)) for _ in range(draws)]
    data = HeldOutData(dataloader, argument="dataloader")
    exchange = _Exchange(base, donor, candidates, [mask for _, _, mask in planned], positions)
    with evaluation(base, donor):
        hidden = None if show_progress else True
        for batch in tqdm(data.batches, desc="patch", unit="batch", disable=hidden):
            exchange.run(batch)
    mine, theirs, *patched = (data.result(found) for found in exchange.results)
    gap = mine.loss - theirs.loss
    if not gap > 0:
        warnings.warn(
            f"the donor's loss is {theirs.loss:.4g} and the base's {mine.loss:.4g}: there is no gap to close, so "
            "sufficiency and necessity are not defined (take data of the ability)",
            ActWarning,
            stacklevel=2,
        )
    rows = tuple(
        _row(name, kind, mask, into_base, into_donor, mine=mine, theirs=theirs)
        for (name, kind, mask), into_base, into_donor in zip(planned, patched[::2], patched[1::2], strict=True)
    )
    samples = 0 if mine.samples is None else len(mine.samples.losses)
    return Patching(
        rows=rows,
        base_loss=mine.loss,
        donor_loss=theirs.loss,
        num_samples=samples,
        num_tokens=data.num_tokens,
        positions=positions.value,
        seed=seed,
    )


def _row(
    name: str,
    kind: str,
    mask: ChannelMask,
    into_base: SkillResult,
    into_donor: SkillResult,
    *,
    mine: SkillResult,
    theirs: SkillResult,
) -> PatchedRow:
    gap = mine.loss - theirs.loss

    def share(change: tuple[float, float | None]) -> tuple[float | None, float | None]:
        value, error = change
        return (value / gap, None if error is None else error / gap) if gap > 0 else (None, None)

    sufficiency, necessity = share(mine.rise_over(into_base)), share(into_donor.rise_over(theirs))
    return PatchedRow(
        name=name,
        channels=kind,
        density=mask.density,
        num_channels=mask.num_selected,
        base_loss=into_base.loss,
        donor_loss=into_donor.loss,
        sufficiency=sufficiency[0],
        sufficiency_error=sufficiency[1],
        necessity=necessity[0],
        necessity_error=necessity[1],
    )


class _Exchange:
    """Runs both models as they are and with exchanged activations, batch by batch.

    Args:
        base: the base.
        donor: the donor.
        candidates: the modules of the masks.
        masks: what is exchanged.
        positions: where.

    Attributes:
        results: of base, donor, and for each mask of the patched base and the patched donor: one a batch.
    """

    def __init__(
        self, base: nn.Module, donor: nn.Module, candidates: Candidates, masks: list[ChannelMask], positions: Positions
    ) -> None:
        self._models = (base, donor)
        self._modules = (candidates.base, candidates.donor)
        self._num_channels = (candidates.num_channels, candidates.donor_channels)
        self._embeddings = candidates.embeddings
        self._masks = masks
        self._positions = positions
        self._vocabulary = CommonVocabulary(base, donor)
        self._kept = {  # what any mask needs of a module's channels
            name: torch.cat([mask[name] for mask in masks]).unique() for name in candidates.base
        }
        self.results: list[list[TokenResults]] = [[] for _ in range(2 + 2 * len(masks))]

    def run(self, batch: Predictions) -> None:
        """Run everything on one batch.

        Raises:
            ActValueError: a module did not run, ran less often in the other model, or has no row for every token.
        """
        self._vocabulary.check(batch.inputs)
        tokens = self._tokens(batch)
        clean = [self._recorded(side, batch, tokens) for side in (0, 1)]
        for side, (found, _) in enumerate(clean):
            self.results[side].append(found)
        for number, mask in enumerate(self._masks):
            for side in (0, 1):
                with self._patching(side, tokens, mask, clean[1 - side][1]):
                    self.results[2 + 2 * number + side].append(token_results(self._models[side], batch))

    def _tokens(self, batch: Predictions) -> AnswerTokens:
        if self._positions is Positions.ANSWER:
            return AnswerTokens(*batch.shape, batch.positions.unique())
        return find_answer_tokens({name: value for name, value in batch.inputs.items() if name != "labels"})

    def _recorded(
        self, side: int, batch: Predictions, tokens: AnswerTokens
    ) -> tuple[TokenResults, dict[str, list[torch.Tensor]]]:
        """The results of a model as it is, and the activations of its channels, `[N * R, K]` a call."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in self._kept}

        def keep(name: str, args: tuple[Any, ...], output: Any) -> None:
            rows = self._located(select_rows, side, name, args, output, tokens)
            seen[name].append(rows.index_select(1, self._kept[name].to(rows.device)))

        with tap_outputs(self._of(side, list(self._kept)), keep):
            found = token_results(self._models[side], batch)
        missing = [name for name, calls in seen.items() if not calls]
        if missing:
            raise ActValueError(
                f"{missing[0]}: did not run, expected every module of the masks to run on every batch ({len(missing)} "
                f"of {len(seen)} modules; leave them out of the masks)"
            )
        return found, seen

    @contextmanager
    def _patching(
        self, side: int, tokens: AnswerTokens, mask: ChannelMask, recorded: Mapping[str, list[torch.Tensor]]
    ) -> Iterator[None]:
        """Inside the context a model's selected channels have the other model's activations."""
        left = {name: iter(recorded[name]) for name in self._kept if mask[name].numel()}

        def patch(name: str, args: tuple[Any, ...], output: Any) -> torch.Tensor:
            other = next(left[name], None)
            if other is None:
                raise ActValueError(f"{name}: ran more often than in the other model, expected equally often")
            channels = mask[name]
            chosen = torch.searchsorted(self._kept[name], channels)
            if isinstance(output, torch.Tensor) and name in self._embeddings and output.shape[0] != tokens.batch_size:
                output = output.expand(tokens.batch_size, *output.shape[-2:])  # positions, the same for every sample
            if isinstance(output, torch.Tensor):
                output = output.clone(memory_format=torch.contiguous_format)
            view, index = self._located(locate_rows, side, name, args, output, tokens)
            rows = view[index]  # [N, C] or [N, R, C]
            values = other[:, chosen.to(other.device)].to(rows)  # [N * R, K]
            rows[..., channels.to(rows.device)] = values.view(*rows.shape[:-1], len(channels))
            view[index] = rows
            return output

        with tap_outputs(self._of(side, list(left)), patch, replace=True):
            yield

    def _of(self, side: int, names: list[str]) -> dict[str, nn.Module]:
        return {name: self._modules[side][name] for name in names}

    def _located(
        self,
        find: Callable[..., Any],
        side: int,
        name: str,
        args: tuple[Any, ...],
        output: Any,
        tokens: AnswerTokens,
    ) -> Any:
        find = partial(find, channels=self._num_channels[side][name], positional=name in self._embeddings)
        try:
            return find(output, args, tokens)
        except ActValueError as error:
            raise ActValueError(f"{name}: {error} (leave the module out of the masks)") from error


def _masks(
    selection: ChannelScores | ChannelMask | Mapping[str, ChannelMask],
    densities: Iterable[float] | None,
    scope: str | Scope,
    normalize: str | Normalization,
) -> dict[str, ChannelMask]:
    """The masks by name, those of scores by their density."""
    if isinstance(selection, ChannelScores):
        wanted = ascending(list(DENSITIES if densities is None else densities), "densities", above=0, most=1)
        comparable = selection.num_comparable
        return {
            f"{density:g}": select_channels(selection, comparable, density, scope=scope, normalize=normalize)
            for density in wanted
        }
    if densities is not None:
        raise ActValueError("densities: got some for a mask, expected None (only scores are selected from)")
    found: Any = {"mask": selection} if isinstance(selection, ChannelMask) else selection
    if not isinstance(found, Mapping) or not all(isinstance(mask, ChannelMask) for mask in found.values()):
        raise ActTypeError(
            f"selection: got {type(selection).__name__}, expected ChannelScores, a ChannelMask, or masks by name"
        )
    if not found:
        raise ActValueError("selection: got no mask, expected at least one")
    return dict(found)


def _in_models(
    base: nn.Module, donor: nn.Module, masks: Mapping[str, ChannelMask]
) -> tuple[dict[str, ChannelMask], Candidates]:
    """The masks, each over the modules of all of them, and these modules in both models."""
    counts: dict[str, int] = {}
    for mask in masks.values():
        counts |= mask.num_channels
    if not any(mask.num_selected for mask in masks.values()):
        raise ActValueError("selection: got no selected channel, expected at least one (a higher density)")
    candidates = find_candidates(base, donor, target_modules=list(counts))
    for title, mask in masks.items():
        for name, count in mask.num_channels.items():
            found = candidates.num_channels.get(name)
            least = candidates.num_comparable.get(name, 0)
            if found != count or (mask[name].numel() and int(mask[name][-1]) >= least):
                got = "no such module" if found is None else f"{found} channels, {least} of which both models have"
                raise ActValueError(
                    f"{name}: the base has {got}, the mask {title} was made for {count} (take masks of this pair)"
                )
    everywhere = ChannelMask({}, counts)
    return {title: mask | everywhere for title, mask in masks.items()}, Candidates(
        base={name: candidates.base[name] for name in counts},
        donor={name: candidates.donor[name] for name in counts},
        num_channels={name: candidates.num_channels[name] for name in counts},
        donor_channels={name: candidates.donor_channels[name] for name in counts},
        embeddings=candidates.embeddings & set(counts),
    )


def _random_like(mask: ChannelMask, candidates: Candidates, generator: torch.Generator) -> ChannelMask:
    """A mask with as many channels of every module, drawn from those that both models have."""
    channels = {
        name: torch.randperm(candidates.num_comparable[name], generator=generator)[: index.numel()]
        for name, index in mask.items()
    }
    return ChannelMask(channels, mask.num_channels)
