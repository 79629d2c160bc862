"""Scores by first-order attribution: the decrease of the loss when a channel moves towards the donor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.batches.predictions import find_predictions
from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.checks import whole_number
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.groups import Group, Groups
from act_peft.localization.pair import twin
from act_peft.localization.settings import Run
from act_peft.localization.sums import ChannelSums, sum_per_channel
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.localization.weights import ParameterPair, parameter_pairs
from act_peft.peft_modules import named_modules

POINTS = 4


def score_attributions(
    base: nn.Module,
    donor: nn.Module,
    candidates: Candidates,
    groups: Groups,
    run: Run,
    *,
    keep: Group | None,
    points: int,
) -> dict[str, ChannelScores]:
    """Minus gradient times difference, averaged over points between the models; formula as in `localize`.

    Raises:
        ActTypeError: `points` is no integer.
        ActValueError: `points` is less than 1; a model without a loss; all other cases as in `localize`.
    """
    attribution = _Attribution(base, donor, candidates, whole_number(points, "points", least=1))
    kept = None if keep is None else attribution.over(keep, run)
    return {name: attribution.over(group, run).scores(kept) for name, group in groups.items()}


class _Decreases(ChannelSums):
    """Sums of attributions: how much the loss decreases, over all tokens so far."""

    def __init__(self, candidates: Candidates) -> None:
        super().__init__(candidates.num_comparable, what="gradients that are")
        self._candidates = candidates

    def resume_(self, scores: ChannelScores) -> None:
        """Go on from the `scores` of an earlier run over the same channels."""
        self.put_(scores.sums, scores.num_tokens)

    def scores(self, kept: _Decreases | None = None) -> ChannelScores:
        """The scores by attribution; what the data to keep lose or gain is added for as many tokens."""
        sums = self.sums
        if kept is not None:
            share = self.num_tokens / kept.num_tokens
            sums = {module: values + kept.sums[module] * share for module, values in sums.items()}
        return ChannelScores(
            self._candidates.padded(sums),
            self.num_tokens,
            kind=ScoreKind.ATTRIBUTION,
            num_comparable=self._candidates.num_comparable,
        )


class _Attribution:
    def __init__(self, base: nn.Module, donor: nn.Module, candidates: Candidates, points: int) -> None:
        self._vocabulary = CommonVocabulary(base, donor)
        self._candidates = candidates
        self._num_comparable = candidates.num_comparable
        self._points = points
        self._base = base
        self._line = InterpolatedModel(base, parameter_pairs(candidates), self._collect)
        self._batch: dict[str, torch.Tensor] = {}

    def over(self, group: Group, run: Run) -> _Decreases:
        """The attributions of all batches of all processes, summed over tokens."""
        totals = _Decreases(self._candidates)
        progress = run.progress(self._candidates, totals, group, settings=(self._points,))

        def attribute(batch: Batch) -> None:
            if progress is not None and progress.is_done(batch):
                return
            predictions = find_predictions(batch)
            labels, num_tokens = predictions.labels(), predictions.targets.numel()
            self._vocabulary.check(batch)
            self._batch = {
                name: torch.zeros(count, dtype=torch.float64) for name, count in self._num_comparable.items()
            }
            for point in range(self._points):
                if self._points > 1:
                    self._line.move_(point / self._points)
                with torch.enable_grad():
                    _loss_of(forward(self._line.model, batch, labels=labels), self._line.model).backward()
            # The loss is a mean over the tokens of the batch; times their number it is a sum.
            totals.add_(
                {name: values * (num_tokens / self._points) for name, values in self._batch.items()}, num_tokens
            )
            if progress is not None:
                progress.advance()

        with evaluation(self._base, self._line.model):
            over_batches(
                group.batches,
                attribute,
                argument=group.argument,
                show_progress=run.show_progress,
                together=run.together,
            )
        if progress is not None:
            progress.write()
        if run.together:
            totals.gather_()
        return totals

    def _collect(self, name: str, gradient: torch.Tensor, pair: ParameterPair) -> None:
        decrease = sum_per_channel(
            lambda slope, donor, base: slope * (base - donor),
            (gradient, pair.donor, pair.base),
            channel_dim=pair.channel_dim,
        )
        self._batch[name] += decrease.to("cpu", torch.float64)


def _loss_of(output: object, model: nn.Module) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ActValueError(
            f"{type(model).__name__}: returned no loss for labels, expected a model with a loss, such as "
            "AutoModelForCausalLM (or use score='activation')"
        )
    if not loss.requires_grad:
        raise ActValueError(
            f"{type(model).__name__}: the loss does not depend on the candidates, expected a gradient (does the model "
            "switch gradients off?)"
        )
    return loss


OnGradient = Callable[[str, torch.Tensor, ParameterPair], None]


class InterpolatedModel:
    """A copy of the base with the candidates at `base + alpha * (donor - base)`; only these get gradients.

    Every candidate in the copy has its own parameters, so each use of a tied weight has its own gradient. Base and
    donor are never written to. Each gradient is passed on and freed at once, so only the gradients of one module are
    in memory.

    Args:
        base: a plain model.
        pairs: candidate -> its parameters in base and donor.
        on_gradient: called with the candidate's name, the gradient and its pair, both of the same shape.
    """

    def __init__(self, base: nn.Module, pairs: Mapping[str, Sequence[ParameterPair]], on_gradient: OnGradient) -> None:
        self.model = twin(base)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        modules = dict(named_modules(self.model))
        self._moving: list[tuple[nn.Parameter, ParameterPair]] = []
        for name, parts in pairs.items():
            for pair in parts:
                module = modules[name].layer
                parameter = nn.Parameter(getattr(module, pair.part).detach().clone())
                module._parameters[pair.part] = parameter
                parameter.register_post_accumulate_grad_hook(_gradient_hook(name, pair, on_gradient))
                self._moving.append((parameter, pair))

    def move_(self, alpha: float) -> None:
        """Move the candidates to `base + alpha * (donor - base)`, rounded to the base's dtype."""
        with torch.no_grad():
            for parameter, pair in self._moving:
                wide = torch.promote_types(torch.promote_types(pair.base.dtype, pair.donor.dtype), torch.float32)
                start, end = (tensor.to(parameter.device, wide) for tensor in (pair.base, pair.donor))
                _common(parameter, pair).copy_(torch.lerp(start, end, alpha))


def _gradient_hook(name: str, pair: ParameterPair, on_gradient: OnGradient) -> Callable[[torch.Tensor], None]:
    def pass_on(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            on_gradient(name, _common(gradient, pair), pair)

    return pass_on


def _common(tensor: torch.Tensor, pair: ParameterPair) -> torch.Tensor:
    """The part of a parameter, or of its gradient, that both models have."""
    return tensor[tuple(slice(0, size) for size in pair.base.shape)]
