"""The inputs of base and donors on their data, collected once; any number of settings are solved from them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from act_peft.adapter.models import name_of, record_in_memory
from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import Batch
from act_peft.batches.repeats import batches_of_all
from act_peft.channels.kinds import weight_of
from act_peft.channels.names import Patterns
from act_peft.channels.origin import ModelRecord, Origin
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActTypeError, ActValueError
from act_peft.fitting.base_weights import weight_fingerprint
from act_peft.fitting.collection import Collector, Moments, Positions, counted_tokens, shared_inputs
from act_peft.fitting.fitted import FittedTransfer
from act_peft.fitting.metric import Metric
from act_peft.fitting.module import FitRecord, FittedModule
from act_peft.fitting.moments import InputMoments
from act_peft.fitting.pair import FittedPair, find_pairs
from act_peft.fitting.settings import FitSettings
from act_peft.fitting.solution import solve_rows
from act_peft.fitting.tokens import solve_tied, solve_tokens
from act_peft.localization.vocabulary import CommonVocabulary
from act_peft.peft_modules import named_modules
from act_peft.processes import all_begin
from act_peft.transfer.parameters import ModelTensors


class PairInputs:
    """Base, donors and their data, in parts that fit into memory.

    Args:
        base: the base, with plain layers.
        donors: the donors, likewise.
        ability: batches for each donor.
        keep: batches to keep, None for none.
        positions: which tokens count.
        target_modules: as in `fit`.
        exclude_modules: as in `fit`.
        show_progress: show progress bars if the error stream is a terminal.

    Raises:
        ActTypeError, ActValueError: as `fit`.
    """

    def __init__(
        self,
        base: nn.Module,
        donors: Sequence[nn.Module],
        ability: Sequence[Iterable[Batch]],
        keep: Iterable[Batch] | None,
        *,
        positions: Positions = Positions.ALL,
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
        show_progress: bool = True,
    ) -> None:
        self._base, self._donors, self._positions, self._show_progress = base, donors, positions, show_progress
        self._fingerprints: dict[str, str] = {}
        self.pairs = find_pairs(base, donors, target_modules=target_modules, exclude_modules=exclude_modules)
        channels = sum(pair.num_rows for pair in self.pairs)
        together = all_begin("fit", f"{channels} rows in {len(self.pairs)} modules", stacklevel=4)
        with evaluation(base, *donors):
            self._ability = [_listed(batches, "ability_dataloader", together) for batches in ability]
            self._keep = None if keep is None else _listed(keep, "keep_dataloader", together)
            modules = {pair.linear: base.get_submodule(pair.linear) for pair in self.pairs if pair.linear}
            first = self._ability[0][0]
            counted_tokens(first, positions)  # refuses what is no batch before a model runs on it
            CommonVocabulary(base, donors[0]).check(first)
            self._leaders = shared_inputs(base, first, modules)

    def parts(self, max_memory: int) -> list[list[FittedPair]]:
        """The modules in parts whose inputs take at most about `max_memory` bytes, or one input each."""
        count = sum(len(counted_tokens(batch, self._positions)) for batches in self._sources for batch in batches)
        groups: dict[str, list[FittedPair]] = {}
        for pair in self.pairs:
            groups.setdefault(self._leaders[pair.linear] if pair.linear else "", []).append(pair)
        parts: list[list[FittedPair]] = [[]]
        used = 0
        for leader, pairs in groups.items():
            size = (
                InputMoments.size(
                    pairs[0].width, count, num_donors=len(self._donors), dtype=weight_of(pairs[0].base).dtype
                )
                if leader
                else 0
            )
            if parts[-1] and used + size > max_memory:
                parts.append([])
                used = 0
            parts[-1] += pairs
            used += size
        return parts

    def collect(self, pairs: Sequence[FittedPair]) -> Moments:
        """Run the models on their data and keep the inputs of some modules.

        Raises:
            ActTypeError, ActValueError: as `fit`.
        """
        collector = Collector(pairs, self._leaders, num_donors=len(self._donors), positions=self._positions)
        models = [*self._donors, self._base]
        with evaluation(self._base, *self._donors):
            for source, batches in enumerate(self._sources):
                model = models[source]
                collector.read(
                    model,
                    source,
                    batches,
                    CommonVocabulary(self._base, model if source < len(self._donors) else self._donors[0]),
                    argument="ability_dataloader" if source < len(self._donors) else "keep_dataloader",
                    show_progress=self._show_progress,
                )
        return collector.moments()

    def record(self, settings: FitSettings, num_tokens: tuple[int, ...]) -> FitRecord:
        """What a fit with these inputs was made from."""
        return FitRecord(
            settings=settings,
            num_tokens=num_tokens,
            base=name_of(self._base),
            donors=tuple(name_of(donor) for donor in self._donors),
            task_type=_task_type(self._base),
            origins=tuple(Origin(self._recorded(self._base), self._recorded(donor)) for donor in self._donors),
        )

    def _recorded(self, model: nn.Module) -> ModelRecord:
        fitted = {name for pair in self.pairs for name in pair.names}
        modules = [(name, module) for name, module in named_modules(model) if name in fitted]
        return record_in_memory(model, modules, as_base=False)

    def result(self, modules: Mapping[str, FittedModule], record: FitRecord, live_base: nn.Module) -> FittedTransfer:
        """The transfer of these modules, with fingerprints of the base's weights."""
        if not self._fingerprints:
            tensors = ModelTensors(self._base)
            parameters = Parameters(tensors, tensors.names)
            self._fingerprints = {
                name: weight_fingerprint(parameters, name, module) for name, module in modules.items()
            }
        marked = {p.name: replace(modules[p.name], fingerprint=self._fingerprints[p.name]) for p in self.pairs}
        return FittedTransfer(marked, record, weakref.ref(live_base))

    def solve(
        self,
        pairs: Sequence[FittedPair],
        moments: Moments,
        settings: FitSettings,
        *,
        max_rank: int,
        release: bool = False,
    ) -> dict[str, FittedModule]:
        """Module name -> its change, by one setting; no model runs.

        Args:
            pairs: the modules.
            moments: of their inputs.
            settings: μ, ε and λ.
            max_rank: as in `fit`.
            release: whether the inputs of a module are forgotten as soon as it is solved.

        Raises:
            ActValueError: as `fit`.
        """
        solver = _Solver(moments, settings, max_rank, release=release)
        hidden = None if self._show_progress else True
        return {
            pair.name: solver.solve(pair)
            # Embeddings last: they take the most memory, and by then the other inputs may be gone.
            for pair in tqdm(
                sorted(pairs, key=lambda pair: pair.is_embedding),
                desc="solve",
                unit="module",
                disable=hidden,
                leave=False,
            )
        }

    @property
    def _sources(self) -> Iterator[list[Batch]]:
        yield from self._ability
        if self._keep is not None:
            yield self._keep


class _Solver:
    """Solves module after module; the metric of an input that several modules share is made once."""

    def __init__(self, moments: Moments, settings: FitSettings, max_rank: int, *, release: bool) -> None:
        self._moments, self._settings, self._max_rank = moments, settings, max_rank
        self._linear = moments.linear if release else dict(moments.linear)
        self._release = release
        self._latest: tuple[InputMoments, Metric] | None = None

    def solve(self, pair: FittedPair) -> FittedModule:
        dtype = weight_of(pair.base).dtype
        nothing = FittedModule(
            pair.names,
            pair.head,
            pair.kind,
            torch.empty(0),
            None,
            torch.empty(0),
            None,
            None,
            None,
            None,
            fingerprint="",
        )
        if pair.is_embedding:
            counts = self._moments.tokens[pair.name]
            found = (
                solve_tied(counts, self._metric(pair.linear), pair.differences, self._settings, dtype=dtype)
                if pair.linear
                else solve_tokens(counts, pair.differences, self._settings, width=pair.width, dtype=dtype)
            )
            return replace(
                nothing,
                delta=found.delta.cpu(),
                gains=found.token_gains,
                token_metric=found.metric,
                token_weights=found.weights,
            )
        if pair.kind.is_norm:
            differences = [difference.cpu() for difference in pair.differences(slice(None))]
            delta, gains = self._moments.elements[pair.name].solve(differences, self._settings)
            weight, bias = _split(pair, delta.to(dtype))
            return replace(nothing, delta=weight, bias=bias, gains=gains)
        solution = solve_rows(
            self._metric(pair.name), pair.differences, pair.num_rows, max_rank=self._max_rank, dtype=dtype
        )
        ranked = self._max_rank > 0
        weight, bias = _split(pair, solution.delta.cpu())
        return replace(
            nothing,
            delta=weight,
            bias=bias,
            gains=solution.gains.cpu(),
            directions=solution.directions.cpu() if ranked else None,
            strengths=solution.strengths.cpu() if ranked else None,
        )

    def _metric(self, name: str) -> Metric:
        moments = self._linear[name]
        if self._release:
            del self._linear[name]
        if self._latest is None or self._latest[0] is not moments:
            self._latest = None  # before the next is made
            self._latest = (moments, moments.metric(self._settings))
        return self._latest[1]


def _split(pair: FittedPair, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The change of the weight, and that of the bias."""
    return (delta[:, :-1].contiguous(), delta[:, -1].contiguous()) if pair.has_bias else (delta, None)


def _listed(batches: Iterable[Batch], argument: str, together: bool) -> list[Batch]:
    """The batches of a dataloader, in a distributed run those of all processes; they may be read more than once."""
    try:
        found = batches_of_all(batches, together=together)
    except TypeError as error:
        raise ActTypeError(
            f"{argument}: got {type(batches).__name__}, expected an iterable of batches ({error})"
        ) from error
    if not found:
        raise ActValueError(
            f"{argument}: got no batch, expected at least one (is the dataset empty, or a generator already used up?)"
        )
    return found


def _task_type(model: nn.Module) -> str | None:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
